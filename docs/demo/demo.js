// The page: recordings in, copies out. The models are graphs of `waveflow export`; build.py makes them.

import * as ort from "./ort/ort.wasm.min.mjs";
import { draw } from "./spectrogram.js";

ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
ort.env.wasm.numThreads = 1;

const RATE = 22050, HOP = 256, BINS = 256, FEWEST = 3;
const MOST_SECONDS = 20;
const $ = (id) => document.getElementById(id);

let listener, speaker;
let now = null; // what was given last: samples, mel, noise, logProb, frames
let kept = null;

// --- the models ---

async function load() {
  const options = { executionProviders: ["wasm"] };
  listener = await ort.InferenceSession.create("models/listen.onnx", options);
  speaker = await ort.InferenceSession.create("models/speak.onnx", options);
}

// Samples (n,) at 22,050 Hz to their mel, noise and log-likelihood by frame.
export async function listen(samples) {
  const frames = Math.ceil(samples.length / HOP);
  if (frames < FEWEST) throw new Error("This is too short: speak for a tenth of a second or more.");
  const padded = new Float32Array(frames * HOP);
  padded.set(samples);
  const audio = new ort.Tensor("float32", padded, [1, padded.length]);
  const { mel, noise, log_prob } = await listener.run({ audio });
  return { samples: padded, frames, mel: mel.data, noise: noise.data, logProb: log_prob.data };
}

// A mel (80 x F) and noise (256 x F), both row by row, to samples (F * 256,).
export async function speak(mel, noise, sigma) {
  const frames = mel.length / 80;
  const feeds = {
    mel: new ort.Tensor("float32", mel, [1, 80, frames]),
    noise: new ort.Tensor("float32", noise, [1, BINS, frames]),
    sigma: new ort.Tensor("float32", Float32Array.of(sigma), []),
  };
  return (await speaker.run(feeds)).audio.data;
}

// Standard normal values of a seed (mulberry32 and Box-Muller).
function normal(n, seed) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
  const values = new Float32Array(n);
  for (let i = 0; i < n; i += 2) {
    const radius = Math.sqrt(-2 * Math.log(1 - uniform())), angle = 2 * Math.PI * uniform();
    values[i] = radius * Math.cos(angle);
    if (i + 1 < n) values[i + 1] = radius * Math.sin(angle);
  }
  return values;
}

// --- what is given ---

async function decode(data) {
  let sound;
  try {
    sound = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(data);
  } catch {
    throw new Error("This is no recording that the browser can read.");
  }
  const samples = new Float32Array(Math.min(sound.length, MOST_SECONDS * RATE));
  for (let channel = 0; channel < sound.numberOfChannels; channel++) {
    const part = sound.getChannelData(channel);
    for (let i = 0; i < samples.length; i++) samples[i] += part[i] / sound.numberOfChannels;
  }
  return { samples, isCut: sound.length > samples.length };
}

async function take(data) {
  await work(async () => {
    const { samples, isCut } = await decode(await data);
    now = await listen(samples);
    $("results").hidden = $("mixing").hidden = false;
    play("recording", now.samples);
    draw($("picture-recording"), now.samples);
    heat($("heat"), now.logProb);
    const mean = now.logProb.reduce((a, b) => a + b, 0) / now.frames;
    $("likelihood").textContent =
      `Log-likelihood ${mean.toFixed(2)} nats per sample. The line shows each frame's: bright where it is low. ` +
      "Loud noise is always less likely than silence.";
    await copy();
    if (isCut) $("status").textContent += ` Only the first ${MOST_SECONDS} seconds were taken.`;
    await mix();
  });
}

async function copy() {
  if (!now) return;
  const sigma = Number($("sigma").value), seed = Number($("seed").value) || 0;
  const begin = performance.now();
  const audio = await speak(now.mel, normal(BINS * now.frames, seed), sigma);
  const took = (performance.now() - begin) / 1000, seconds = audio.length / RATE;
  play("audio-copy", audio);
  draw($("picture-copy"), audio);
  $("speed").textContent =
    `${seconds.toFixed(1)} s of speech in ${took.toFixed(2)} s: ${(seconds / took).toFixed(1)} times real time here.`;
  $("status").textContent = "Here is the copy.";
}

async function mix() {
  if (!kept || !now) return;
  const t = Number($("mix").value), frames = Math.min(kept.frames, now.frames);
  // On the circle between the two noises: a straight line would be too quiet in the middle.
  const angle = (t * Math.PI) / 2;
  const mel = between(kept.mel, kept.frames, now.mel, now.frames, frames, 80, 1 - t, t);
  const noise = between(kept.noise, kept.frames, now.noise, now.frames, frames, BINS, Math.cos(angle), Math.sin(angle));
  play("mixed", await speak(mel, noise, 1));
}

function between(a, aFrames, b, bFrames, frames, rows, aShare, bShare) {
  const mixed = new Float32Array(rows * frames);
  for (let row = 0; row < rows; row++) {
    for (let f = 0; f < frames; f++) {
      mixed[row * frames + f] = aShare * a[row * aFrames + f] + bShare * b[row * bFrames + f];
    }
  }
  return mixed;
}

async function work(task) {
  $("status").textContent = "Working …";
  try {
    await task();
  } catch (error) {
    $("status").textContent = error.message;
  }
}

// --- what is shown ---

function play(id, samples) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const word = (at, text) => [...text].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  word(0, "RIFF"); view.setUint32(4, 36 + 2 * samples.length, true); word(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true); view.setUint32(28, 2 * RATE, true); view.setUint16(32, 2, true);
  view.setUint16(34, 16, true); word(36, "data"); view.setUint32(40, 2 * samples.length, true);
  samples.forEach((v, i) => view.setInt16(44 + 2 * i, Math.max(-1, Math.min(1, v)) * 32767, true));
  URL.revokeObjectURL($(id).src);
  $(id).src = URL.createObjectURL(new Blob([view], { type: "audio/wav" }));
}

function heat(canvas, logProb) {
  canvas.width = logProb.length;
  canvas.height = 1;
  const pen = canvas.getContext("2d"), sorted = Float32Array.from(logProb).sort();
  const low = sorted[Math.floor(0.02 * sorted.length)], high = sorted[Math.floor(0.98 * (sorted.length - 1))];
  logProb.forEach((value, f) => {
    const v = Math.min(1, Math.max(0, (value - low) / (high - low || 1)));
    pen.fillStyle = `hsl(${Math.round(50 - 50 * v)} 95% ${Math.round(75 - 65 * v)}%)`;
    pen.fillRect(f, 0, 1, 1);
  });
}

// --- the controls ---

let recorder = null;

async function record() {
  if (recorder) return recorder.stop?.();
  recorder = {}; // until the microphone is there
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  const chunks = [];
  recorder = new MediaRecorder(stream);
  recorder.ondataavailable = (event) => chunks.push(event.data);
  recorder.onstop = async () => {
    stream.getTracks().forEach((track) => track.stop());
    recorder = null;
    $("record").textContent = "Speak into the microphone";
    await take(await new Blob(chunks).arrayBuffer());
  };
  recorder.start();
  $("record").textContent = "Stop";
  $("status").textContent = "Recording …";
}

$("file").addEventListener("change", async () => {
  const [file] = $("file").files;
  if (file) await take(await file.arrayBuffer());
});
$("record").addEventListener("click", () => {
  record().catch(() => {
    recorder = null;
    $("status").textContent = "The microphone cannot be used here.";
  });
});
$("example").addEventListener("click", () => take(fetch("models/example.wav").then((r) => r.arrayBuffer())));
$("sigma").addEventListener("input", () => { $("sigma-value").textContent = $("sigma").value; });
for (const id of ["sigma", "seed"]) $(id).addEventListener("change", () => work(copy));
$("keep").addEventListener("click", () => {
  kept = now;
  $("mix-controls").hidden = false;
  $("status").textContent = "Kept. Now give another recording.";
});
$("mix").addEventListener("input", () => { $("mix-value").textContent = $("mix").value; });
$("mix").addEventListener("change", () => work(async () => { await mix(); $("status").textContent = "Here is the mixture."; }));
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(name, async (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragenter" || name === "dragover");
    const [file] = name === "drop" && speaker ? event.dataTransfer.files : [];
    if (file) await take(await file.arrayBuffer());
  });
}

const givers = ["file", "record", "example"];
for (const id of givers) $(id).disabled = true;
load().then(
  () => {
    for (const id of givers) $(id).disabled = false;
    $("status").textContent = "Ready.";
  },
  (error) => { $("status").textContent = `The model cannot be loaded: ${error.message}`; },
);
window.waveflow = { listen, speak };

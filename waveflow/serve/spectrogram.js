// A picture of samples: for the server's page, and for the page of docs/demo.

export function draw(canvas, samples) {
  const n = 1024, width = (canvas.width = 480), height = (canvas.height = 256);
  const pen = canvas.getContext("2d"), image = pen.createImageData(width, height);
  const re = new Float32Array(n), im = new Float32Array(n);
  for (let x = 0; x < width; x++) {
    const start = Math.round((x / width) * Math.max(0, samples.length - n));
    for (let i = 0; i < n; i++) {
      re[i] = (samples[start + i] || 0) * (0.5 - 0.5 * Math.cos((2 * Math.PI * i) / n));
      im[i] = 0;
    }
    fft(re, im);
    for (let y = 0; y < height; y++) {
      const bin = height - 1 - y;
      const v = Math.min(1, Math.max(0, Math.log10(Math.hypot(re[2 * bin], im[2 * bin]) + 1e-6) / 5 + 0.75));
      image.data.set([255 * Math.min(1, 2 * v), 255 * v * v, 510 * v * (1 - v), 255], 4 * (y * width + x));
    }
  }
  pen.putImageData(image, 0, 0);
}

// In place; the length is a power of 2.
function fft(re, im) {
  const n = re.length;
  for (let i = 1, j = 0; i < n; i++) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) [re[i], re[j], im[i], im[j]] = [re[j], re[i], im[j], im[i]];
  }
  for (let size = 2; size <= n; size *= 2) {
    for (let k = 0; k < size / 2; k++) {
      const c = Math.cos((-2 * Math.PI * k) / size), s = Math.sin((-2 * Math.PI * k) / size);
      for (let i = k; i < n; i += size) {
        const j = i + size / 2, a = re[j] * c - im[j] * s, b = re[j] * s + im[j] * c;
        re[j] = re[i] - a; im[j] = im[i] - b; re[i] += a; im[i] += b;
      }
    }
  }
}

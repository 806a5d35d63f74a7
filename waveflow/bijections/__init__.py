"""Invertible maps of (B, C, L) signals; `base` holds the contract."""

from waveflow.bijections.actnorm import ActNorm
from waveflow.bijections.augment import Augment
from waveflow.bijections.autoregressive import Autoregressive, OverChannels, OverTime
from waveflow.bijections.base import Bijection, Condition, Inverse
from waveflow.bijections.batchnorm import BatchNorm
from waveflow.bijections.chain import Chain
from waveflow.bijections.check import BijectionReport, check_bijection
from waveflow.bijections.condition import EveryNth, MapCond, SqueezeCondition
from waveflow.bijections.conv1x1 import InvertibleConv1x1, InvertibleConv1x1PLU
from waveflow.bijections.coupling import ActiveFirst, AllActive, Coupling, EvenOdd, Halves
from waveflow.bijections.elementwise import Additive, Affine
from waveflow.bijections.factor_out import FactorOut, OnChannels
from waveflow.bijections.lapped import LappedSqueeze
from waveflow.bijections.mixture import MixtureOfLogistics
from waveflow.bijections.permute import Permute, Reverse
from waveflow.bijections.spline import RationalQuadratic
from waveflow.bijections.squeeze import Squeeze

__all__ = [
    "ActNorm",
    "ActiveFirst",
    "Additive",
    "Affine",
    "AllActive",
    "Augment",
    "Autoregressive",
    "BatchNorm",
    "Bijection",
    "BijectionReport",
    "Chain",
    "Condition",
    "Coupling",
    "EvenOdd",
    "EveryNth",
    "FactorOut",
    "Halves",
    "Inverse",
    "InvertibleConv1x1",
    "InvertibleConv1x1PLU",
    "LappedSqueeze",
    "MapCond",
    "MixtureOfLogistics",
    "OnChannels",
    "OverChannels",
    "OverTime",
    "Permute",
    "RationalQuadratic",
    "Reverse",
    "Squeeze",
    "SqueezeCondition",
    "check_bijection",
]

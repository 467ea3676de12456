"""Gymnasium environments that decide a problem's knobs one at a time; they see numbers, never networks."""

from __future__ import annotations

import gymnasium

from autocompress.envs.channel_pruning import ChannelPruningEnv, Reward
from autocompress.envs.joint import JointEnforce, JointEnv
from autocompress.envs.layerwise import LayerwiseEnv
from autocompress.envs.mixed_precision import Enforce, MixedPrecisionEnv, swept

__all__ = [
    "ChannelPruningEnv",
    "Enforce",
    "JointEnforce",
    "JointEnv",
    "LayerwiseEnv",
    "MixedPrecisionEnv",
    "Reward",
    "swept",
]

gymnasium.register("autocompress/ChannelPruning-v0", "autocompress.envs.channel_pruning:ChannelPruningEnv")
gymnasium.register("autocompress/MixedPrecision-v0", "autocompress.envs.mixed_precision:MixedPrecisionEnv")
gymnasium.register("autocompress/Joint-v0", "autocompress.envs.joint:JointEnv")

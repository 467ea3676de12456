"""Gymnasium environments that decide a problem's knobs one at a time; they see numbers, never networks."""

from __future__ import annotations

import gymnasium

from autocompress.envs.channel_pruning import ChannelPruningEnv
from autocompress.envs.layerwise import LayerwiseEnv, Reward

__all__ = ["ChannelPruningEnv", "LayerwiseEnv", "Reward"]

gymnasium.register("autocompress/ChannelPruning-v0", "autocompress.envs.channel_pruning:ChannelPruningEnv")

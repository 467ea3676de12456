"""CHASE: search for the module between a frozen backbone and a matching head, on moving sprites."""

from autocompress.nas.tracking.backbone import Backbone, FrozenBackbone, train_backbone
from autocompress.nas.tracking.matching import (
    Localisation,
    Matching,
    Tracker,
    correlation,
    localise,
    matching_of,
)
from autocompress.nas.tracking.necks import FrameNetwork
from autocompress.nas.tracking.scenery import Sprites, digit_sprites, fashion_sprites
from autocompress.nas.tracking.sequences import MatchingData, Pairs, SequenceSettings, moving_sprites
from autocompress.nas.tracking.space import TrackingCell

__all__ = [
    "Backbone",
    "FrameNetwork",
    "FrozenBackbone",
    "Localisation",
    "Matching",
    "MatchingData",
    "Pairs",
    "SequenceSettings",
    "Sprites",
    "Tracker",
    "TrackingCell",
    "correlation",
    "digit_sprites",
    "fashion_sprites",
    "localise",
    "matching_of",
    "moving_sprites",
    "train_backbone",
]

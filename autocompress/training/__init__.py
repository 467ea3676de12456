"""Data sets, training with resume, distillation, evaluation and BatchNorm recalibration."""

from autocompress.training.batches import batches, training_images
from autocompress.training.checkpoint import weights_digest
from autocompress.training.data import Augment, Data, Images, Samples, from_datasets, subset
from autocompress.training.evaluate import Scores, evaluate, recalibrate_batchnorm
from autocompress.training.loop import distillation_loss, fit
from autocompress.training.settings import EpochReport, TrainSettings
from autocompress.training.sources import DATASETS, load_data

__all__ = [
    "DATASETS",
    "Augment",
    "Data",
    "EpochReport",
    "Images",
    "Samples",
    "Scores",
    "TrainSettings",
    "batches",
    "distillation_loss",
    "evaluate",
    "fit",
    "from_datasets",
    "load_data",
    "recalibrate_batchnorm",
    "subset",
    "training_images",
    "weights_digest",
]

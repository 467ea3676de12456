"""Matching on moving sprites: where in a search patch is what the template shows?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autocompress.core.errors import DataError, RecipeError
from autocompress.nas.tracking.scenery import Floats, Sprites, divide, photo_tiles
from autocompress.training import Data, Images
from autocompress.training.batches import derived_seed

STRIDE = 2
"""Pixels per position of the correlation map."""
SPLITS = ("train", "search", "holdout", "test")
_SHARES = (0.35, 0.25, 0.15, 0.25)
# Of the digits' training frames; the same for every sprite and split.
_MEAN, _STD = (0.3, 0.3), (0.25, 0.25)


@dataclass(frozen=True, slots=True)
class SequenceSettings:
    """How sequences look.

    Args:
        sequences: number of sequences per split: train, search, holdout, test.
        num_frames: search patches per sequence.
        reach: largest shift between two frames in pixels, even.
        num_distractors: other sprites near the target.
        noise: standard deviation of the pixels' noise, on the scale [0, 1].
        fading: the target's brightness differs from its template's by a factor in [1 - fading, 1].
        backdrop: brightness of the photographs, as a factor.

    Raises:
        RecipeError: values out of range, all at once.
    """

    sequences: tuple[int, int, int, int] = (128, 128, 64, 128)
    num_frames: int = 8
    reach: int = 6
    num_distractors: int = 2
    noise: float = 0.1
    fading: float = 0.4
    backdrop: float = 0.7

    def __post_init__(self) -> None:
        rules = (
            ("sequences", "must be 4 counts >= 1", len(self.sequences) == 4 and min(self.sequences) >= 1),
            ("num_frames", "must be >= 1", self.num_frames >= 1),
            ("reach", "must be even and >= 2", self.reach >= 2 and self.reach % 2 == 0),
            ("num_distractors", "must be >= 0", self.num_distractors >= 0),
            ("noise", "must be in [0, 1)", 0 <= self.noise < 1),
            ("fading", "must be in [0, 1)", 0 <= self.fading < 1),
            ("backdrop", "must be in [0, 1]", 0 <= self.backdrop <= 1),
        )
        faults = [f"{name} {rule}, got {getattr(self, name)}" for name, rule, holds in rules if not holds]
        if faults:
            raise RecipeError(faults)


@dataclass(frozen=True, eq=False)
class Pairs:
    """A split: pairs of a template and a search patch.

    Args:
        images: (N, 2, side, side); channel 0 is the target in its first frame, at the centre, channel 1 a
            later frame around the place where the target was one frame before. The label is the number of
            the position, row by row, at which the target begins.
        offsets: (N, 2), pixels from the patch's upper left corner to the target's, rows first.
        sprites: numbers of the sprites that occur.
        tiles: numbers of the backgrounds that occur.
    """

    images: Images
    offsets: Tensor
    sprites: frozenset[int]
    tiles: frozenset[int]


@dataclass(frozen=True, eq=False)
class MatchingData:
    """Four splits that share no sprite and no background.

    Args:
        name: how reports call it.
        splits: ``train``, ``search``, ``holdout`` and ``test``.
        side: height and width of a patch in pixels.
        sprite_side: height and width of a target in pixels.
        centred: single sprites on backgrounds, (N, 1, side, side), with their classes, for the backbone to
            learn from; its test split is made of the hold-out's sprites.
    """

    name: str
    splits: Mapping[str, Pairs]
    side: int
    sprite_side: int
    centred: Data

    @property
    def num_positions(self) -> int:
        """Positions of the correlation map along each axis."""
        return (self.side - self.sprite_side) // STRIDE + 1

    @property
    def data(self) -> Data:
        """The splits that a search and a training take."""
        return Data(
            name=self.name,
            train=self.splits["train"].images,
            search=self.splits["search"].images,
            test=self.splits["test"].images,
            num_classes=self.num_positions**2,
            input_shape=(2, self.side, self.side),
        )


def moving_sprites(sprites: Sprites, settings: SequenceSettings, *, seed: int) -> MatchingData:
    """Sequences of sprites that move before photographs, cut into pairs of patches.

    In every sequence a target takes random steps of up to ``reach`` pixels along each axis, all sizes equally
    likely, so that a patch's content alone tells where it went. Other sprites of the same split stand
    near it, at new places in every frame, and pass behind it. Light fades and noise is drawn per frame.

    Args:
        sprites: what moves.
        settings: how.
        seed: of the division and of everything drawn.

    Raises:
        DataError: too few sprites or backgrounds for four splits.
    """
    side = sprites.side + 2 * settings.reach
    tiles = photo_tiles(2 * side)
    sprite_parts = divide(sprites.labels, _SHARES, seed=seed)
    tile_parts = divide(np.zeros(len(tiles), dtype=np.int64), _SHARES, seed=seed)
    for what, parts, least in (("sprites", sprite_parts, 2), ("backgrounds", tile_parts, 1)):
        if min(len(part) for part in parts) < least:
            raise DataError(f"{sprites.name} has too few {what} for four splits: {[len(p) for p in parts]}")
    splits, stages = dict[str, Pairs](), dict[str, _Stage]()
    for number, name in enumerate(SPLITS):
        stages[name] = _Stage(sprites, tiles, sprite_parts[number], tile_parts[number], settings)
        generator = np.random.default_rng(derived_seed(seed, number))
        splits[name] = stages[name].pairs(settings.sequences[number], generator)
    backbone, checked, last = (
        stages[name].centred(np.random.default_rng(derived_seed(seed, number)))
        for number, name in enumerate(SPLITS[:3], len(SPLITS))
    )
    num_classes = int(sprites.labels.max()) + 1
    centred = Data(f"centred {sprites.name}", backbone, checked, last, num_classes, (1, side, side))
    return MatchingData(f"moving {sprites.name}", splits, side, sprites.side, centred)


@dataclass(frozen=True, eq=False)
class _Stage:
    """Draws the sequences of one split."""

    sprites: Sprites
    tiles: Floats
    sprite_numbers: NDArray[np.int64]
    tile_numbers: NDArray[np.int64]
    settings: SequenceSettings

    @property
    def reach(self) -> int:
        return self.settings.reach

    @property
    def side(self) -> int:
        return self.sprites.side + 2 * self.reach

    def pairs(self, num_sequences: int, generator: np.random.Generator) -> Pairs:
        """All pairs of some sequences."""
        patches, offsets, used, tiles = list[Floats](), list[NDArray[np.int64]](), set[int](), set[int]()
        for _ in range(num_sequences):
            chosen = generator.choice(
                self.sprite_numbers,
                1 + min(self.settings.num_distractors, len(self.sprite_numbers) - 1),
                False,
            )
            tile = int(generator.choice(self.tile_numbers))
            used |= {int(n) for n in chosen}
            tiles.add(tile)
            for patch, offset in self._sequence(chosen, tile, generator):
                patches.append(patch)
                offsets.append(offset)
        corner = torch.from_numpy(np.stack(offsets))
        label = (corner // STRIDE) @ torch.tensor([self.reach + 1, 1])
        images = Images(_pixels(np.stack(patches)), label, mean=_MEAN, std=_STD)
        return Pairs(images, corner, frozenset(used), frozenset(tiles))

    def _sequence(
        self, chosen: NDArray[np.int64], tile: int, generator: np.random.Generator
    ) -> list[tuple[Floats, NDArray[np.int64]]]:
        """Pairs (2, side, side) with the target's offset in the search patch (2,)."""
        last = self.tiles.shape[1] - self.sprites.side - self.reach
        before = generator.integers(self.reach, last + 1, 2)
        template = self._patch(chosen, tile, before, before, generator)
        found = []
        for _ in range(self.settings.num_frames):
            steps = generator.integers(-self.reach, self.reach + 1, 2)
            now = before + np.where((before + steps < self.reach) | (before + steps > last), -steps, steps)
            patch = self._patch(chosen, tile, now, before, generator)
            found.append((np.stack([template, patch]), now - before + self.reach))
            before = now
        return found

    def _patch(
        self,
        chosen: NDArray[np.int64],
        tile: int,
        target: NDArray[np.int64],
        centre: NDArray[np.int64],
        generator: np.random.Generator,
    ) -> Floats:
        """One frame with the target at a corner, cut around the sprite's box at another."""
        settings, top = self.settings, centre - self.reach
        frame = settings.backdrop * self.tiles[tile]
        for number in chosen[1:]:
            _paste(frame, self.sprites.images[number], top + generator.integers(0, 2 * self.reach + 1, 2))
        light = 1 - settings.fading * generator.random()
        _paste(frame, self.sprites.images[chosen[0]], target, light)
        patch = frame[top[0] : top[0] + self.side, top[1] : top[1] + self.side]
        noisy: Floats = patch + settings.noise * generator.standard_normal(patch.shape, dtype=np.float32)
        return noisy.clip(0, 1)

    def centred(self, generator: np.random.Generator) -> Images:
        """Every sprite once at the centre of a patch, with its class."""
        last = self.tiles.shape[1] - self.sprites.side - self.reach
        patches = []
        for number in self.sprite_numbers:
            tile, place = (
                int(generator.choice(self.tile_numbers)),
                generator.integers(self.reach, last + 1, 2),
            )
            patches.append(self._patch(np.array([number]), tile, place, place, generator))
        labels = torch.from_numpy(self.sprites.labels[self.sprite_numbers])
        return Images(_pixels(np.stack(patches)[:, None]), labels, mean=_MEAN[:1], std=_STD[:1])


def _paste(frame: Floats, sprite: Floats, corner: NDArray[np.int64], light: float = 1.0) -> None:
    """Draw a sprite on a frame in place; its values are its opacity."""
    side = len(sprite)
    under = frame[corner[0] : corner[0] + side, corner[1] : corner[1] + side]
    under[...] = under * (1 - sprite) + light * sprite


def _pixels(values: Floats) -> Tensor:
    return torch.from_numpy(np.round(255 * values).astype(np.uint8))

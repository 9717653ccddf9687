"""Dice and Hausdorff distance of whole volumes, whose slices a segmentor sees one by one."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects


@METRICS.register_module()
class VolumeMetric(BaseMetric):
    """Dice in per cent and HD95 of every class but the first, the background, averaged over volumes, then over classes.

    A class that is neither in a volume nor in its prediction is left out there. Where it is in one of them alone, its
    Dice is 0 and its distance, which there is none of, is left out. Papers on Synapse count a class predicted in vain
    as Dice 1 and distance 0.

    Args:
        volume: regular expression that a file's stem matches in full, with groups "volume" and "slice", such as
            ``r"(?P<volume>case\\d+)_slice(?P<slice>\\d+)"``. None: each image is a volume of its own.
        spacing: of slices, rows and columns (of rows and columns where ``volume`` is None), in millimetres; the
            default of 1 gives distances in voxels.
        distance: compute HD95, which takes most of the time.
        collect_device: where results of several processes meet, "cpu" or "gpu".

    Raises:
        ValueError: a file's name does not match, slices are there twice or differ in size, or ``volume`` lacks a group.
    """

    default_prefix = None

    def __init__(
        self,
        volume: str | None = None,
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
        distance: bool = True,
        collect_device: str = "cpu",
    ) -> None:
        super().__init__(collect_device=collect_device)
        self.pattern = None if volume is None else re.compile(volume)
        if self.pattern is not None and not {"volume", "slice"} <= self.pattern.groupindex.keys():
            raise ValueError(f"volume: got {volume!r}, expected groups (?P<volume>...) and (?P<slice>...)")
        self.spacing, self.distance = tuple(spacing), distance

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep the labels of every slice, a byte for each pixel."""
        for sample in data_samples:
            stem = Path(sample["img_path"]).stem
            name, index = stem, 0
            if self.pattern is not None:
                match = self.pattern.fullmatch(stem)
                if match is None:
                    raise ValueError(f"volume: {stem!r} does not match {self.pattern.pattern!r}")
                name, index = match["volume"], int(match["slice"])
            labels = [sample[key]["data"].squeeze(0).cpu().numpy() for key in ("pred_sem_seg", "gt_sem_seg")]
            self.results.append((name, index, *(x.astype(np.uint8) for x in labels)))

    def compute_metrics(self, results: list[tuple[str, int, np.ndarray, np.ndarray]]) -> dict[str, float]:
        classes = (self.dataset_meta or {}).get("classes") or ()
        volumes: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = defaultdict(dict)
        for name, index, predicted, true in results:
            if index in volumes[name]:
                raise ValueError(f"volume: slice {index} of {name!r} is there twice")
            volumes[name][index] = (predicted, true)
        dice: dict[int, list[float]] = defaultdict(list)
        distances: dict[int, list[float]] = defaultdict(list)
        for name, slices in volumes.items():
            if len({x.shape for pair in slices.values() for x in pair}) > 1:
                raise ValueError(f"volume: the slices of {name!r} differ in size")
            predicted, true = (np.stack([slices[i][k] for i in sorted(slices)]) for k in (0, 1))
            counted = true != 255
            if self.pattern is None:
                predicted, true, counted = predicted[0], true[0], counted[0]
            for label in range(1, len(classes) or int(max(predicted.max(), true[counted].max(initial=0))) + 1):
                found, wanted = (predicted == label) & counted, true == label
                if not found.any() and not wanted.any():
                    continue
                dice[label].append(100 * dice_coefficient(found, wanted))
                if self.distance and found.any() and wanted.any():
                    distances[label].append(hausdorff_95(found, wanted, self.spacing[-found.ndim :]))
        metrics = {"Dice": _mean([np.mean(x) for x in dice.values()])}
        if self.distance:
            metrics["HD95"] = _mean([np.mean(x) for x in distances.values()])
        for label in sorted(dice):
            metrics[f"Dice_{classes[label] if classes else label}"] = float(np.mean(dice[label]))
        return metrics


def dice_coefficient(found: np.ndarray, wanted: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|) of two masks of which one at least is not empty."""
    return float(2 * (found & wanted).sum() / (int(found.sum()) + int(wanted.sum())))


def hausdorff_95(found: np.ndarray, wanted: np.ndarray, spacing: Sequence[float]) -> float:
    """The 95th percentile of the distances of either surface's voxels to the other surface, as medpy computes it.

    Args:
        found: a mask of two or three axes that is not empty; its surface are the voxels with a neighbour outside.
        wanted: another.
        spacing: distance of voxels along each axis.
    """
    box = find_objects((found | wanted).astype(np.uint8))[0]
    surfaces = []
    for mask in (found[box], wanted[box]):
        mask = np.pad(mask, 1)
        surfaces.append(mask & ~binary_erosion(mask))
    a, b = surfaces
    to_b, to_a = (distance_transform_edt(~x, sampling=spacing) for x in (b, a))
    return float(np.percentile(np.concatenate([to_b[a], to_a[b]]), 95))


def _mean(values: Sequence[Any]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")

"""How fast NeMo Curator filters stored embeddings: the reference figure, from its own environment.

    python3 -m venv nemo && nemo/bin/pip install nemo-curator   # with the CPU build of torch
    nemo/bin/python benchmarks/nemo_curator_reference.py --embeddings embeddings.npy --rows 20000

Two figures. `stage`: `ImageAestheticFilterStage.process` on batches that lie in memory, its model
loaded, the best of a few rounds, at the model batch that suits it best. `pipeline`: a whole
`Pipeline` of a source stage, which cuts such batches from the file, and that filter, under the
reference's own default executor or another. A run of one batch comes first; what it takes is the
start-up, and the rate is what the other batches added to it, so give it enough `--pipeline-rows`.
Nothing is downloaded: without `--head` the weights are random, which decides no speed. One JSON
object goes to standard output, all else to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import ray
import torch
from nemo_curator.backends.base import BaseExecutor
from nemo_curator.backends.ray_actor_pool import RayActorPoolExecutor
from nemo_curator.backends.ray_data import RayDataExecutor
from nemo_curator.backends.xenna import XennaExecutor
from nemo_curator.models.aesthetics import MLP, AestheticScorer
from nemo_curator.pipeline import Pipeline
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.image.filters import ImageAestheticFilterStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import FileGroupTask, ImageBatch, ImageObject
from numpy.typing import NDArray
from safetensors.numpy import load_file
from safetensors.torch import save_file

WIDTH = 768
LAYERS = (0, 2, 4, 6, 7)  # of the reference's network; the others are dropout
EXECUTORS: dict[str, Callable[[], BaseExecutor]] = {
    # its default leaves 5% of the cores alone, rounded up to one: half of a machine with two
    "xenna": lambda: XennaExecutor({"cpu_allocation_percentage": 1.0}),
    "ray_data": RayDataExecutor,
    "ray_actor_pool": RayActorPoolExecutor,
}


def batch(path: str, start: int, stop: int) -> ImageBatch:
    """Rows of the file as one task, from the file's start again where it ends."""
    stored = np.load(path, mmap_mode="r")
    taken = np.arange(start, stop)
    # float32, as its embedding stage makes them; its network refuses any other type
    vectors = stored[taken % len(stored)].astype(np.float32)
    images = [
        ImageObject(image_path=f"{row:09d}.jpg", image_id=f"{row:09d}", embedding=vector)
        for row, vector in zip(taken.tolist(), vectors, strict=True)
    ]
    return ImageBatch(dataset_name="embeddings", data=images)


def ranges(rows: int, size: int) -> list[tuple[int, int]]:
    """The rows of each batch."""
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


class EmbeddingSource(ProcessingStage[FileGroupTask, ImageBatch]):
    """The pipeline's source: images that have their embeddings already, a batch for each task."""

    name = "embedding_source"
    resources = Resources(cpus=0.5)  # what the reference's own file partitioning takes

    def inputs(self) -> tuple[list[str], list[str]]:
        """Nothing: it is the source."""
        return [], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """Tasks with their images in `data`."""
        return ["data"], []

    def process(self, task: FileGroupTask) -> ImageBatch:
        """The rows that the task names."""
        return batch(task.data[0], *task.reader_config["rows"])


def network(head: Path | None) -> dict[str, torch.Tensor]:
    """The weights for the reference's network: random, its own checkpoint's, or a folded head's.

    A folded head (one affine layer) is laid into the first unit of each layer: the same scores, and
    the same work, as the network multiplies by every weight whatever it is.
    """
    torch.manual_seed(0)
    weights = {name: tensor.clone() for name, tensor in MLP().state_dict().items()}
    if head is None:
        return weights
    if head.suffix == ".npz":
        with np.load(head) as archive:
            stored: dict[str, NDArray[Any]] = dict(archive)
    else:
        stored = load_file(head)
    if all(name in stored for name in weights):
        return {
            name: torch.from_numpy(np.asarray(stored[name], np.float32).reshape(tuple(old.shape)))
            for name, old in weights.items()
        }
    affine = {name.rsplit(".", 1)[-1]: array for name, array in stored.items()}
    for tensor in weights.values():
        tensor.zero_()
    for layer in LAYERS:
        weights[f"layers.{layer}.weight"][0, 0] = 1
    row = np.asarray(affine["weight"], np.float32).reshape(WIDTH)
    weights["layers.0.weight"][0] = torch.from_numpy(row)
    weights["layers.7.bias"][0] = float(np.asarray(affine["bias"]).reshape(()))
    return weights


def make_model_folder(folder: str, head: Path | None) -> None:
    """Lay the weights where the reference looks for a download before it starts one."""
    path = Path(AestheticScorer(folder).get_weights_path())
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(network(head), path)


def middle_score(path: str, rows: int, model: str) -> float:
    """The median score, so that any head lets half of the rows through."""
    scorer = AestheticScorer(model)
    scorer.setup()
    images = batch(path, 0, min(rows, 5000)).data
    return float(np.median(scorer(np.stack([image.embedding for image in images])).cpu().numpy()))


def stage_rate(stage: ImageAestheticFilterStage, made: list[ImageBatch], rounds: int) -> float:
    """Rows a second of `process` over `made`: the best round."""
    rows = sum(task.num_items for task in made)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for task in made:
            stage.process(task)
        best = min(best, time.perf_counter() - start)
    return rows / best


def run_pipeline(
    executor: BaseExecutor, path: str, rows: int, size: int, stage: ImageAestheticFilterStage
) -> float:
    """Seconds that a pipeline of the two stages took until the kept images were here."""
    pipeline = Pipeline(name="aesthetic_filter", stages=[EmbeddingSource(), stage])
    tasks = [
        FileGroupTask(dataset_name="embeddings", data=[path], reader_config={"rows": taken})
        for taken in ranges(rows, size)
    ]
    start = time.perf_counter()
    # A cluster of its own, named for the executor, which would balk at a second one nearby; the
    # executor shuts it down.
    os.environ["RAY_ADDRESS"] = ray.init(address="local").address_info["gcs_address"]
    try:
        results = pipeline.run(executor, initial_tasks=tasks) or []
    finally:
        del os.environ["RAY_ADDRESS"]
        ray.shutdown()
    wall = time.perf_counter() - start
    kept = sum(task.num_items for task in results)
    if not 0 < kept < rows:
        raise RuntimeError(f"{kept} of {rows} rows came back, and about half should")
    return wall


def measure_executor(
    name: str, path: str, rows: int, size: int, stage: ImageAestheticFilterStage, rounds: int
) -> dict[str, Any]:
    """Start-up, rate and wall time of the whole pipeline under one executor."""
    make = EXECUTORS[name]
    startup = median(run_pipeline(make(), path, size, size, stage) for _ in range(rounds))
    wall = median(run_pipeline(make(), path, rows, size, stage) for _ in range(rounds))
    added = wall - startup
    if added < 0.2 * startup:
        print(f"{name}: {rows:,} rows hardly add to the start-up: take more", file=sys.stderr)
    return {
        "executor": name,
        "startup_s": round(startup, 2),
        "pipeline_rows": rows,
        "pipeline_wall_s": round(wall, 2),
        "pipeline_rows_per_s": round((rows - size) / added) if added > 0 else None,
        "pipeline_rows_per_s_with_startup": round(rows / wall),
    }


def arguments() -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--embeddings", type=Path, required=True, help="a .npy file, (N, 768)")
    parser.add_argument("--rows", type=int, default=20_000, help="rows for the stage alone")
    parser.add_argument("--pipeline-rows", type=int, help="rows for the pipeline (default: --rows)")
    parser.add_argument("--head", type=Path, help=".npz or .safetensors: the network or one layer")
    parser.add_argument("--batch", type=int, default=500, help="images in an ImageBatch")
    parser.add_argument("--executor", choices=[*EXECUTORS, "best", "none"], default="xenna")
    parser.add_argument("--rounds", type=int, default=5, help="rounds for the stage alone")
    parser.add_argument("--pipeline-rounds", type=int, default=1, help="runs of each pipeline")
    return parser.parse_args()


def measure(asked: argparse.Namespace, model: str) -> dict[str, Any]:
    """All figures."""
    path = str(asked.embeddings.resolve())
    threshold = middle_score(path, asked.rows, model)
    made = [batch(path, *rows) for rows in ranges(asked.rows, asked.batch)]
    rates = {}
    for inference in (ImageAestheticFilterStage.model_inference_batch_size, asked.batch):
        stage = ImageAestheticFilterStage(
            model_dir=model, model_inference_batch_size=inference, score_threshold=threshold
        )
        stage.setup_on_node()
        stage.setup()
        rates[inference] = stage_rate(stage, made, asked.rounds)
    fastest = max(rates, key=lambda inference: rates[inference])
    found: dict[str, Any] = {
        "version": version("nemo-curator"),
        "torch": torch.__version__,
        "cpus": len(os.sched_getaffinity(0)),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "batch": asked.batch,
        "model_batch": fastest,
        "stage_rows": asked.rows,
        "stage_rows_per_s": round(rates[fastest]),
        "stage_rows_per_s_by_model_batch": {str(size): round(r) for size, r in rates.items()},
    }
    if asked.executor == "none":
        return found
    stage = ImageAestheticFilterStage(
        model_dir=model, model_inference_batch_size=fastest, score_threshold=threshold
    )
    rows = asked.pipeline_rows or asked.rows
    results: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    for name in EXECUTORS if asked.executor == "best" else [asked.executor]:
        try:
            results.append(
                measure_executor(name, path, rows, asked.batch, stage, asked.pipeline_rounds)
            )
        except Exception as error:  # an executor that does not work here is a finding
            failures[name] = f"{type(error).__name__}: {error}"
    if results:
        found |= max(results, key=lambda result: result["pipeline_rows_per_s"] or 0)
    return found | {"executors": results, "failed_executors": failures}


def main() -> None:
    """Measure, and print one JSON object."""
    asked = arguments()
    # Ray's processes inherit standard output: keep it for the result, give them the error stream
    sys.stdout.flush()
    result = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(prefix="nemo-") as folder:
        os.environ |= {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
        model = str(Path(folder) / "models")
        make_model_folder(model, asked.head)
        found = measure(asked, model)
    print(json.dumps(found), file=result, flush=True)


if __name__ == "__main__":
    main()

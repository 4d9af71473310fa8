"""The stages of `mixbit run`: each reads and writes plain files, leaves a manifest, and can be stopped at any time."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

import mixbit
from mixbit import report as reports
from mixbit.analysis import network_sqnr
from mixbit.assignment import METHODS, MODES
from mixbit.costs.named import FAMILIES, NamedCost, named_cost
from mixbit.errors import MixbitError, check_choice, did_you_mean
from mixbit.evaluation import DETECTION_METRICS, METRICS
from mixbit.export import DIALECTS as PROGRAM_DIALECTS
from mixbit.export import ONNX_DIALECTS, simulation
from mixbit.files import PathLike, file_digest, remove_temporaries, write_atomic, write_bytes, write_text
from mixbit.network import UnsupportedOperation, batch_size
from mixbit.progress import Progress, reporter
from mixbit.quantizers import SearchSpace, TensorStatistics, first_images, input_statistics, record_tensors_
from mixbit.recipe import MAPS, Recipe, check_bits, without_files
from mixbit.retrain import Mechanisms
from mixbit.search import Found
from mixbit.sources import fingerprint, load_data, load_images, load_model
from mixbit.sweeps import SHARES, points_as_csv
from mixbit.tables import CostTable, SensitivityTable
from mixbit.training import Images

COSTS: dict[str, Callable[..., CostTable]] = {
    "ops": mixbit.costs.ops,
    "bops": mixbit.costs.bops,
    "weight_memory": mixbit.costs.weight_memory,
    "activation_memory": mixbit.costs.activation_memory,
}

#: Options of the stages that train.
_TRAINING: dict[str, Any] = {
    "epochs": 3,
    "lr": 0.01,
    "scale_lr": None,
    "weight_decay": 1e-4,
    "distill": 0.0,
    "temperature": 4.0,
    "clip_norm": None,
    "bf16": False,
    "reestimate": True,
    "ranges": "mse",
    "checkpoint_every": 50,
}

#: What retraining may do beside plain steps: a switch for each mechanism, and what it is told.
_MECHANISMS: dict[str, Any] = {
    f.name: list(f.default) if isinstance(f.default, tuple) else f.default for f in dataclasses.fields(Mechanisms)
}

#: What a search may be asked for: one of these.
_AIMS = ("budget", "budget_share", "strength")

#: Options of each stage with their defaults: what a config may say.
STAGES: dict[str, dict[str, Any]] = {
    "analyze": {
        "precisions": [2, 3, 4, 5, 6, 7, 8],
        "point": "layer_output",
        "joint": False,
        "ranges": "mse",
        "granularity": "per_channel",
    },
    "assign": {
        "method": "greedy",
        "mode": "sqnr",
        "cost": "bops",
        "target_sqnr_db": None,
        "budget": None,
        "budget_share": None,
        "max_drop": None,
        "metric": "top1",
        "first_last_min": None,
        "depthwise_min": None,
        "rounding": None,
        "narrow_range": None,
    },
    "profile": {"threads": 1, "repeats": 30, "isa": None, "cold": False},
    "refine": {"latency": None, "mode": "strict", "widths": [2, 4, 8], "recipe": None},
    "sweep": {
        "methods": list(METHODS),
        "modes": list(MODES),
        "costs": ["bops"],
        "shares": list(SHARES),
        "measure": True,
        "metric": "top1",
        "ranges": "mse",
        "integer": False,
        "first_last_min": None,
        "depthwise_min": None,
        "search": None,
    },
    "search": {
        "kind": "gates",
        "precisions": [2, 4, 8],
        "act_precisions": None,
        "weight_precisions": None,
        "tie": False,
        "channel_group": None,
        "cost": "bops",
        "budget": None,
        "budget_share": None,
        "strength": None,
        "form": "expected",
        "start_epoch": 0,
        "search_lr": 1e-3,
        **_TRAINING,
    },
    "retrain": {**_TRAINING, "weight_quantizer": None, "act_quantizer": None, **_MECHANISMS},
    "evaluate": {"metric": "top1", "method": "mse", "integer": True},
    "export": {
        "formats": ["onnx"],
        "dialect": None,
        "exact": True,
        "opset": None,
        "any_batch": True,
        "compact": False,
        "method": "mse",
    },
    "verify": {"artifacts": None, "images": 64, "method": "mse"},
    "report": {"title": None, "runtime": None},
}

#: Files that the stage `export` makes, by format, and the dialects of each, the first by default.
EXPORTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "onnx": ("network.onnx", ONNX_DIALECTS),
    "program": ("network.program.pt2", PROGRAM_DIALECTS),
    "package": ("network.package.pt2", PROGRAM_DIALECTS),
    "integer": ("network.mixbit", ("packed",)),
}

#: What may be done to a network without training, in this order: "equalize" before it is analyzed, the others after it
#: is calibrated at a recipe.
CORRECTIONS = ("equalize", "rounding", "bias")

Say = Callable[[str], None]

#: Folder of a sweep's recipes, below the output folder.
RECIPES = "recipes"
#: Weights and grids of the network that was trained at the recipe's bits, batch normalization folded.
TRAINED = "trained.safetensors"
#: The recipe of the trained network, where training has given weights extra levels.
TRAINED_RECIPE = "trained_recipe.json"
#: Weights and grids of the network as a search left it, prepared at the recipe that was found.
SEARCHED = "searched.safetensors"
#: What a search may choose with.
SPACES: dict[str, Callable[..., SearchSpace]] = {
    "gates": mixbit.search.Gates,
    "mixture": mixbit.search.Mixture,
    "fractional": mixbit.search.Fractional,
}

#: What the stage `verify` found, by artifact.
VERIFICATION = "verification.json"
#: What the stage `profile` measures; later stages may name it before it exists.
PROFILE = "profile.csv"
#: What a refinement makes of recipe.json.
REFINED = "refined_recipe.json"


_CONFIG: dict[str, Any] = {
    "model": None,
    "data": None,
    "output": None,
    "seed": 0,
    "corrections": [],
    "stages": None,
}


def _known(where: str, values: Any, allowed: Mapping[str, Any]) -> dict[str, Any]:
    """The allowed keys with their defaults, overridden by `values`."""
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise MixbitError(f"{where} is {values!r}; expected keys and values")
    for key in values:
        if key not in allowed:
            raise MixbitError(
                f"{where}: unknown key {key!r}; expected some of {list(allowed)}{did_you_mean(str(key), allowed)}"
            )
    return {**allowed, **values}


@dataclasses.dataclass(frozen=True)
class Config:
    """A pipeline: model, data, folder, seed, corrections, and the stages in order with their options."""

    model: dict[str, Any]
    calibration: dict[str, Any]
    test: dict[str, Any] | None
    training: dict[str, Any] | None
    output: Path
    seed: int
    corrections: tuple[str, ...]
    stages: tuple[tuple[str, dict[str, Any]], ...]

    @classmethod
    def from_dict(cls, document: Any) -> Config:
        """Checks a config document.

        Raises:
            MixbitError: A key is unknown or missing, or a stage does not exist.
        """
        top = _known("config", document, _CONFIG)
        for key in ("model", "data", "output", "stages"):
            if top[key] is None:
                raise MixbitError(f"config: {key!r} is missing")
        source = {"source": top["model"]} if isinstance(top["model"], str) else top["model"]
        model = _known("config: model", source, {"source": None, "weights": None, "options": {}})
        data = _known("config: data", top["data"], {"calibration": None, "test": None, "training": None})
        if data["calibration"] is None:
            raise MixbitError("config: data: 'calibration' is missing")

        def data_source(name: str, **more: Any) -> dict[str, Any] | None:
            value = data[name]
            if value is None:
                return None
            value = {"source": value} if isinstance(value, str) else value
            return _known(f"config: data: {name}", value, {"source": None, "images": None, "batch": 64, **more})

        if not isinstance(top["seed"], int) or isinstance(top["seed"], bool):
            raise MixbitError(f"config: seed={top['seed']!r}; expected a whole number")
        if not isinstance(top["corrections"], list):
            raise MixbitError(f"config: corrections={top['corrections']!r}; expected a list, some of {CORRECTIONS}")
        for name in top["corrections"]:
            check_choice("corrections", name, CORRECTIONS)
        if not isinstance(top["stages"], list) or not top["stages"]:
            raise MixbitError("config: stages: expected a list of verbs")
        stages: list[tuple[str, dict[str, Any]]] = []
        for entry in top["stages"]:
            verb, options = (entry, {}) if isinstance(entry, str) else next(iter(_single(entry).items()))
            if verb not in STAGES:
                raise MixbitError(
                    f"config: stages: unknown stage {verb!r}; expected some of {list(STAGES)}"
                    f"{did_you_mean(verb, STAGES)}"
                )
            if verb in [v for v, _ in stages]:
                raise MixbitError(f"config: stages: {verb!r} appears twice")
            known = _known(f"config: stages: {verb}", options, STAGES[verb])
            if known.get("search") is not None:
                own = {k: v for k, v in STAGES["search"].items() if k not in ("cost", *_AIMS)}
                known["search"] = _known(f"config: stages: {verb}: search", known["search"], own)
            if "profile" not in [v for v, _ in stages] or not _awaits(known, Path(top["output"]) / PROFILE):
                named_costs(known)
            _check_exports(verb, known)
            makers = [v for v, _ in stages if v in ("assign", "search")]
            if makers and known.get("recipe") is not None:
                raise MixbitError(f"config: stages: {verb}: recipe={known['recipe']!r} beside the stage {makers[0]!r}")
            if makers and verb in ("assign", "search"):
                raise MixbitError(
                    f"config: stages: {makers[0]!r} and {verb!r} both make the recipe; expected one of them"
                )
            stages.append((verb, known))
        calibration = data_source("calibration")
        assert calibration is not None
        return cls(
            model,
            calibration,
            data_source("test"),
            data_source("training", batch=128, augment=None),
            Path(top["output"]),
            top["seed"],
            tuple(c for c in CORRECTIONS if c in top["corrections"]),
            tuple(stages),
        )

    @classmethod
    def load(cls, path: PathLike) -> Config:
        """Reads a YAML (or JSON) config."""
        try:
            document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise MixbitError(f"cannot read the config {str(path)!r}: {error}") from error
        except yaml.YAMLError as error:
            raise MixbitError(f"{str(path)!r} is no YAML document: {' '.join(str(error).split())}") from error
        return cls.from_dict(document)


def _single(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise MixbitError(f"config: stages: {entry!r}; expected a verb, or one verb with its options")
    return {str(k): v for k, v in entry.items()}


def _check_exports(verb: str, options: Mapping[str, Any]) -> None:
    """What `export` and `verify` are asked for.

    Raises:
        MixbitError: A format or dialect is unknown, or a list is none.
    """
    if verb == "export":
        formats = options["formats"]
        if not isinstance(formats, list) or not formats:
            raise MixbitError(f"formats={formats!r}: expected a list of some of {list(EXPORTS)}")
        for name in formats:
            check_choice("formats", name, EXPORTS)
            if options["dialect"] is not None:
                check_choice("dialect", options["dialect"], EXPORTS[name][1])
    if verb == "verify":
        if options["artifacts"] is not None and not isinstance(options["artifacts"], list):
            raise MixbitError(f"artifacts={options['artifacts']!r}: expected a list of files")
        images = options["images"]
        if images is not None and (isinstance(images, bool) or not isinstance(images, int) or images < 1):
            raise MixbitError(f"images={images!r}: expected a whole number from 1, or nothing for all")


def named_costs(options: Mapping[str, Any]) -> list[NamedCost]:
    """The costs that a stage's options name.

    Raises:
        MixbitError: Some cost is unknown, or is named twice.
    """
    if "cost" in options:
        return [named_cost("cost", options["cost"], COSTS)]
    if "latency" in options:
        given = options["latency"]
        if not isinstance(given, str):
            raise MixbitError(f"latency={given!r}: expected FILE.csv, pulp:TARGET or mapper:ARCHITECTURE:delay")
        return [named_cost("latency", given if given.partition(":")[0] in FAMILIES else f"latency:{given}", COSTS)]
    given = options.get("costs", [])
    if not isinstance(given, list):
        raise MixbitError(f"costs={given!r}: expected a list of at least one entry")
    return [named_cost("costs", entry, COSTS) for entry in given]


def _awaits(options: Mapping[str, Any], path: Path) -> bool:
    """Whether a stage's options name a latency table that is not there yet."""
    costs = options.get("costs")
    given = [options.get("cost"), options.get("latency"), *(costs if isinstance(costs, list) else [])]
    tables = [Path(entry.removeprefix("latency:")) for entry in given if isinstance(entry, str)]
    return path in tables and not path.exists()


def refinement_of(folder: Path) -> dict[str, Any] | None:
    """What refinement.json says, if it was made of the recipe.json that is there."""
    path, recipe = folder / "refinement.json", folder / "recipe.json"
    if not (path.exists() and recipe.exists() and (folder / REFINED).exists()):
        return None
    document: dict[str, Any] = json.loads(path.read_text())
    return document if document["of"] == file_digest(recipe) else None


def versions() -> dict[str, str]:
    """Versions that decide results."""
    return {"mixbit": mixbit.__version__, "torch": torch.__version__}


def number(option: str, value: Any) -> float:
    """An option as a number: YAML reads 1e-3 as text.

    Raises:
        MixbitError: It is none.
    """
    try:
        if not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise MixbitError(f"{option}={value!r}: expected a number")


def _on_grids(recipe: Recipe, options: Mapping[str, Any]) -> Recipe:
    """The recipe with the rounding and the ends of the grids that options name; what they leave out stays."""
    given = {name: options[name] for name in ("rounding", "narrow_range") if options[name] is not None}
    if not isinstance(given.get("narrow_range", True), bool):
        raise MixbitError(f"narrow_range={given['narrow_range']!r}: expected true or false")
    recipe.layers = {name: dataclasses.replace(precision, **given) for name, precision in recipe.layers.items()}
    if recipe.default is not None:
        recipe.default = dataclasses.replace(recipe.default, **given)
    return recipe


def _mechanisms(options: Mapping[str, Any]) -> Mechanisms:
    """The mechanisms that a stage's options switch on."""
    given = {name: options[name] for name in _MECHANISMS}
    for name in ("alpha", "rho", "fraction", "rate", "window", "freeze_begin", "freeze_momentum", "dampen"):
        given[name] = None if given[name] is None else number(name, given[name])
    given["dampen_begin"] = number("dampen_begin", given["dampen_begin"])
    for name in ("assign_at", "freeze"):
        value = given[name]
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            value = [value]
        given[name] = tuple(number(name, v) for v in value) if isinstance(value, (list, tuple)) else value
    return Mechanisms(**given)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _recipe_content(recipe: Recipe) -> dict[str, Any]:
    """What decides a result: the document, and the maps beside it."""
    # A recipe in memory has the same channel bits as its file.
    content = without_files(recipe.to_dict(), ("channel_bits",))
    for kind in MAPS:
        maps = {name: hashlib.sha256(found.tobytes()).hexdigest() for name, found in getattr(recipe, kind).items()}
        content |= {kind: maps} if maps else {}
    return content


class Pipeline:
    """Runs the stages of a config, skipping those whose manifest says that nothing changed."""

    def __init__(self, config: Config, say: Say = lambda text: None, progress: Any = None) -> None:
        self.config = config
        self.folder = config.output
        self.say = say
        self.progress = progress
        torch.manual_seed(config.seed)
        m = config.model
        self.model: nn.Module = load_model(m["source"], m["weights"], m["options"])
        c = config.calibration
        self.calibration = load_data(c["source"], c["images"], c["batch"])
        if not self.calibration:
            raise MixbitError(f"data: {c['source']!r} holds no batches; expected at least one")
        self.test: list[Any] | None = None
        if config.test is not None:
            self.test = load_data(config.test["source"], config.test["images"], config.test["batch"])
        self.example = first_images(self.calibration[0])
        self.content = _digest(
            fingerprint(self.model),
            fingerprint(self.calibration),
            None if self.test is None else fingerprint(self.test),
            config.corrections,
        )
        if "equalize" in config.corrections:
            mixbit.equalize_(mixbit.fold_batchnorm_(self.model, self.example), self.example)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MixbitError(f"output={str(self.folder)!r} cannot be made: {error.strerror or error}") from error
        for folder in (self.folder, self.folder / RECIPES):
            remove_temporaries(folder)

    def run(self) -> list[Path]:
        """Runs all stages; returns the files written or kept."""
        made: list[Path] = []
        for verb, options in self.config.stages:
            stage: Callable[[dict[str, Any]], list[str]] = getattr(self, verb)
            made += self._stage(verb, options, stage)
        return made

    def _stage(self, verb: str, options: dict[str, Any], stage: Callable[[dict[str, Any]], list[str]]) -> list[Path]:
        manifest = self.folder / f"{verb}.manifest.json"
        earlier = [v for v, _ in self.config.stages[: [v for v, _ in self.config.stages].index(verb)]]
        inputs = {v: self._outputs(v) for v in earlier}
        files = [cost.digest for cost in named_costs(options)]
        if options.get("recipe") is not None:
            files.append(_digest(_recipe_content(Recipe.load(options["recipe"]))))
        if verb == "verify":
            files += [file_digest(path) for path in self._artifacts(options)]
        if verb == "report" and options["runtime"] is not None:
            files.append(_digest(_runtime_profile(Path(options["runtime"]))))
        content = {"model_and_data": self.content}
        if verb in ("search", "retrain") or options.get("search") is not None:
            content["training"] = self._training_content
        key = _digest(verb, options, files, self.config.seed, content, inputs, versions())
        kept = self._manifest(manifest)
        if kept is not None and kept["key"] == key and self._outputs(verb) == kept["outputs"]:
            self.say(f"{verb}: done before, kept")
            return [self.folder / name for name in kept["outputs"]]
        self.say(f"{verb}: {json.dumps({k: v for k, v in options.items() if v is not None})}")
        start = time.perf_counter()
        names = stage(options)
        document = {
            "verb": verb,
            "key": key,
            "options": options,
            "seed": self.config.seed,
            "versions": versions(),
            "inputs": {**content, **inputs},
            "outputs": {name: file_digest(self.folder / name) for name in names},
        }
        write_text(manifest, json.dumps(document, indent=2) + "\n")
        self._timing(verb, time.perf_counter() - start)
        return [self.folder / name for name in names]

    @staticmethod
    def _manifest(path: Path) -> dict[str, Any] | None:
        if not path.exists():
            return None
        try:
            document = json.loads(path.read_text())
            return document if {"key", "options", "outputs"} <= set(document) else None
        except (ValueError, TypeError):
            return None

    def _outputs(self, verb: str) -> dict[str, str] | None:
        """Names and digests of a finished stage's files as they are now."""
        document = self._manifest(self.folder / f"{verb}.manifest.json")
        if document is None:
            return None
        paths = {name: self.folder / name for name in document["outputs"]}
        return {name: file_digest(path) if path.exists() else "missing" for name, path in paths.items()}

    def _timing(self, verb: str, seconds: float) -> None:
        """Wall-clock figures live in a file of their own: all others are the same bytes in every run."""
        path = self.folder / "timings.json"
        try:
            timings = json.loads(path.read_text()) if path.exists() else {}
        except ValueError:
            timings = {}
        timings[verb] = round(seconds, 3)
        write_text(path, json.dumps(timings, indent=2) + "\n")

    def _read(self, name: str, verb: str) -> Path:
        path = self.folder / name
        if not path.exists():
            raise MixbitError(f"{str(path)!r} is missing; run the stage {verb!r} first")
        return path

    # ---------------------------------------------------------------------------------------------------------- stages

    def analyze(self, options: dict[str, Any]) -> list[str]:
        """sensitivity.json and .csv."""
        table = mixbit.analyze(
            self.model,
            self.calibration,
            options["precisions"],
            options["point"],
            options["joint"],
            ranges=options["ranges"],
            granularity=options["granularity"],
            checkpoint=self.folder / ".analyze.partial",
            progress=self.progress,
        )
        table.save(self.folder / "sensitivity.json")
        table.to_csv(self.folder / "sensitivity.csv")
        return ["sensitivity.json", "sensitivity.csv"]

    def assign(self, options: dict[str, Any]) -> list[str]:
        """recipe.json, assignment.json and the cost table."""
        table = SensitivityTable.load(self._read("sensitivity.json", "analyze"))
        check_choice("method", options["method"], METHODS)
        check_choice("mode", options["mode"], MODES)
        costs = self._costs(options, table)[0][1]
        recipe = _on_grids(self._assigned(table, costs, options), options)
        recipe.save(self.folder / "recipe.json")
        costs.save(self.folder / "costs.json")
        write_text(self.folder / "assignment.json", json.dumps(_plain(recipe.report), indent=2) + "\n")
        return ["recipe.json", "costs.json", "assignment.json"]

    def _costs(self, options: Mapping[str, Any], table: SensitivityTable) -> list[tuple[str, CostTable]]:
        """The cost tables that options name, at the widths of a sensitivity table."""
        widths = {*table.act_bits, *table.weight_bits}
        return [(cost.name, cost.make(self.model, self.example, widths)) for cost in named_costs(options)]

    def _assigned(self, table: SensitivityTable, costs: CostTable, options: dict[str, Any]) -> Recipe:
        asked = [k for k in ("target_sqnr_db", "budget", "budget_share", "max_drop") if options[k] is not None]
        if len(asked) != 1:
            raise MixbitError(
                f"assign: {' and '.join(asked) or 'nothing'} given; expected one of target_sqnr_db, budget, "
                "budget_share (of uniform 8/8) or max_drop (of the metric on the test data)"
            )
        arguments: dict[str, Any] = {"method": options["method"], "mode": options["mode"], **self._minima(options)}
        if options["target_sqnr_db"] is not None:
            arguments["target_sqnr_db"] = float(options["target_sqnr_db"])
        elif options["max_drop"] is not None:
            test = self._test("max_drop")
            metric = check_choice("metric", options["metric"], METRICS)
            arguments |= {
                "metric": lambda recipe: mixbit.evaluate(self._quantized(recipe, "mse", False), test, metric),
                "reference": mixbit.evaluate(self.model, test, metric),
                "max_drop": float(options["max_drop"]),
            }
        elif options["budget"] is not None:
            arguments["budget"] = float(options["budget"])
        else:
            arguments["budget"] = float(options["budget_share"]) * costs.uniform(8, 8)
        return mixbit.assign(table, costs, **arguments)

    def profile(self, options: dict[str, Any]) -> list[str]:
        """profile.csv: latencies on this machine, with profile.json beside it; goes on where it was stopped."""
        path = self.folder / PROFILE
        mixbit.profile(self.model, self.example, path, force=True, progress=self.progress, **options)
        return [PROFILE, str(Path(PROFILE).with_suffix(".json"))]

    def refine(self, options: dict[str, Any]) -> list[str]:
        """refined_recipe.json, refinement.json and the latency table; recipe.json too where a recipe is given."""
        made = []
        if options["recipe"] is not None:
            Recipe.load(options["recipe"]).save(self.folder / "recipe.json")
            made.append("recipe.json")
        path = self._read("recipe.json", "assign")
        recipe = Recipe.load(path)
        precisions = [recipe[name] for name in mixbit.layers(self.model, self.example).names]
        widths = {bits for p in precisions for bits in (p.act, p.weight) if bits is not None}
        if not isinstance(options["widths"], list):
            raise MixbitError(f"widths={options['widths']!r}: expected a list of bits, e.g. [2, 4, 8]")
        widths |= {bits for b in options["widths"] if (bits := check_bits("widths", b)) is not None}
        (cost,) = named_costs(options)
        table = cost.make(self.model, self.example, widths)
        refined = mixbit.refine(recipe, table, options["mode"])
        self._predict(refined)
        refined.save(self.folder / REFINED)
        table.save(self.folder / "latency.json")
        document = {"of": file_digest(path), "latency": cost.name, "unit": table.unit, **refined.report}
        write_text(self.folder / "refinement.json", json.dumps(document, indent=2) + "\n")
        return [*made, REFINED, "latency.json", "refinement.json"]

    def _predict(self, recipe: Recipe) -> None:
        """Writes the predicted SQNR into a recipe, where its widths were analyzed."""
        sensitivity = self.folder / "sensitivity.json"
        if sensitivity.exists():
            with contextlib.suppress(KeyError):
                predicted = SensitivityTable.load(sensitivity).predicted_sqnr_db(recipe)
                recipe.sqnr_db = predicted if math.isfinite(predicted) else None

    def _recipe(self) -> tuple[Recipe, dict[str, Any] | None]:
        """The recipe to evaluate and report, and its refinement: the refined one, unless a config only makes one."""
        verbs = [verb for verb, _ in self.config.stages]
        path = self._read("recipe.json", "assign")
        made_here = "refine" in verbs or not {"assign", "search"} & {*verbs}
        refinement = refinement_of(self.folder) if made_here else None
        return Recipe.load(path if refinement is None else self.folder / REFINED), refinement

    def _minima(self, options: dict[str, Any]) -> dict[str, Any]:
        """What `assign` and `sweep` take of least widths."""
        found = mixbit.layers(self.model, self.example)
        return {
            "first_last_min": options["first_last_min"],
            "depthwise_min": options["depthwise_min"],
            "depthwise": [layer.name for layer in found if layer.depthwise],
        }

    def _test(self, what: str) -> list[Any]:
        if not self.test:
            raise MixbitError(f"{what} needs labelled data: config: data: 'test' is missing")
        return self.test

    def _quantized(self, recipe: Recipe, method: str, integer: bool, corrected: bool = True) -> nn.Module:
        """The network at a recipe: calibrated from one pass of statistics for all recipes, and corrected."""
        folded, statistics = self._folded
        model = mixbit.prepare_(copy.deepcopy(folded), recipe, self.example)
        example = self.example if integer else None
        try:
            mixbit.calibrate_(model, self.calibration, method, example=example, statistics=statistics)
        except UnsupportedOperation as error:
            raise MixbitError(
                f"{error}; the fake-quantized network can be measured without the integer one (evaluate --no-integer, "
                "sweep without --integer, integer: false in a config)"
            ) from error
        if corrected and "rounding" in self.config.corrections:
            mixbit.optimize_rounding_(model, self.calibration)
        if corrected and "bias" in self.config.corrections:
            mixbit.correct_bias_(model, self.calibration)
        return model

    @functools.cached_property
    def _folded(self) -> tuple[nn.Module, dict[str, TensorStatistics]]:
        folded = mixbit.fold_batchnorm_(copy.deepcopy(self.model), self.example)
        return folded, input_statistics(folded, self.calibration)

    @functools.cached_property
    def training(self) -> Images:
        """The data to train on."""
        given = self.config.training
        if given is None:
            raise MixbitError("retrain needs data to train on: config: data: 'training' is missing")
        return load_images(
            given["source"], given["images"], given["batch"], augment=given["augment"], seed=self.config.seed
        )

    @functools.cached_property
    def _training_content(self) -> str:
        return _digest(fingerprint([self.training.x, self.training.y]), self.training.describe())

    def _fitting(self, verb: str, options: dict[str, Any], *state: Any) -> dict[str, Any]:
        """What `search.fit` and `retrain.fit` have in common; checkpoints of another state are removed."""
        share = number("distill", options["distill"])
        if not 0 <= share <= 1:
            raise MixbitError(f"distill={share:g}: expected a share of the loss from 0 to 1")
        name = _digest(options, self._training_content, *state, versions())
        checkpoint = self.folder / f".{verb}-{name}.partial"
        for other in self.folder.glob(f".{verb}-*.partial"):
            if other != checkpoint:
                other.unlink()
        scale_lr, clip_norm = (None if options[k] is None else number(k, options[k]) for k in ("scale_lr", "clip_norm"))
        return {
            "epochs": options["epochs"],
            "lr": number("lr", options["lr"]),
            "scale_lr": scale_lr,
            "weight_decay": number("weight_decay", options["weight_decay"]),
            "teacher": self.model if share else None,
            "temperature": number("temperature", options["temperature"]),
            "teacher_weight": share or 1.0,
            "clip_norm": clip_norm,
            "bf16": bool(options["bf16"]),
            "reestimate": bool(options["reestimate"]),
            "checkpoint": checkpoint,
            "checkpoint_every": options["checkpoint_every"],
            "progress": self.progress,
        }

    def search(self, options: dict[str, Any]) -> list[str]:
        """recipe.json, assignment.json, the cost table, the history of the search, and the weights it trained."""
        space = self._space(options)
        costs = named_costs(options)[0].make(self.model, self.example, self._searched_widths(space))
        asked = [k for k in _AIMS if options[k] is not None]
        if len(asked) != 1:
            raise MixbitError(
                f"search: {' and '.join(asked) or 'nothing'} given; expected one of budget, budget_share (of uniform "
                "8/8) or strength (of the penalty)"
            )
        value = number(asked[0], options[asked[0]])
        if asked == ["budget_share"]:
            value *= costs.uniform(8, 8)
        aim = {"strength" if asked == ["strength"] else "budget": value}
        model, found, checkpoint = self._fit_search("search", options, space, costs, aim)
        recipe = found.recipe
        files = self._save_recipe("recipe.json", recipe)
        costs.save(self.folder / "costs.json")
        self._save_state(SEARCHED, model, recipe)
        document = {**recipe.report, "predicted_sqnr_db": recipe.sqnr_db}
        write_text(self.folder / "assignment.json", json.dumps(_plain(document), indent=2) + "\n")
        write_text(self.folder / "search.json", json.dumps(found.history.to_dict(), indent=1) + "\n")
        write_text(self.folder / "search.csv", found.history.to_csv())
        checkpoint.unlink(missing_ok=True)
        return [*files, "costs.json", SEARCHED, "assignment.json", "search.json", "search.csv"]

    def _save_recipe(self, name: str, recipe: Recipe) -> list[str]:
        """Saves a recipe in the folder; its file and that of its channel bits, which goes where it has none."""
        beside = str(Path(name).with_suffix(".channel_bits.safetensors"))
        recipe.save(self.folder / name)
        if recipe.channel_maps:
            return [name, beside]
        (self.folder / beside).unlink(missing_ok=True)
        return [name]

    @staticmethod
    def _space(options: dict[str, Any]) -> SearchSpace:
        kind = check_choice("kind", options["kind"], SPACES)
        named = {name: options[name] for name in ("precisions", "act_precisions", "weight_precisions")}
        for name, widths in named.items():
            if widths is not None and not isinstance(widths, list):
                raise MixbitError(f"{name}={widths!r}: expected a list of bits, e.g. [2, 4, 8]")
        if kind == "gates":
            named["tie"] = bool(options["tie"])
            if options["channel_group"] is not None:
                named |= {"granularity_bits": "per_channel", "group": options["channel_group"]}
        elif options["tie"]:
            raise MixbitError(f"tie=true: only gates can be shared; kind is {kind!r}")
        elif options["channel_group"] is not None:
            raise MixbitError(
                f"channel_group={options['channel_group']!r}: only gates choose by channel; kind is {kind!r}"
            )
        return SPACES[kind](**named)

    @staticmethod
    def _searched_widths(space: SearchSpace) -> set[int]:
        """Widths that a cost table of a search has; layers that read the network's input keep 8 bits of it."""
        return {*space.act_precisions, *space.weight_precisions, 8}

    def _fit_search(
        self, name: str, options: dict[str, Any], space: SearchSpace, costs: CostTable, aim: dict[str, float]
    ) -> tuple[nn.Module, Found, Path]:
        """A search from the float network: the model at the recipe that was found, all about it, its checkpoint."""
        model = mixbit.prepare_(copy.deepcopy(self.model), space, self.example)
        mixbit.calibrate_(model, self.calibration, options["ranges"])
        fitting = self._fitting(name, options, fingerprint(model), costs.values.tolist(), aim, self.config.seed)
        torch.manual_seed(self.config.seed)
        given: dict[str, Any] = {**aim, **fitting}
        found = mixbit.search.fit(
            model,
            self.training,
            costs,
            form=options["form"],
            start_epoch=options["start_epoch"],
            search_lr=number("search_lr", options["search_lr"]),
            say=lambda text: self.say(f"{name}: {text}"),
            **given,
        )
        mixbit.prepare_(model, found.recipe, self.example)
        self._predict(found.recipe)
        return model, found, fitting["checkpoint"]

    def _save_state(self, name: str, model: nn.Module, recipe: Recipe) -> None:
        tensors = {key: value.detach().clone() for key, value in model.state_dict().items()}
        write_bytes(self.folder / name, save(tensors, {"mixbit": self._trained_key(recipe)}))

    def _load_state(self, name: str, verb: str, tensors: bool = True) -> tuple[str | None, dict[str, Tensor]]:
        """What the state belongs to, and its tensors if they are asked for."""
        path = self._read(name, verb)
        try:
            with safe_open(str(path), framework="pt") as file:
                key = (file.metadata() or {}).get("mixbit")
                names = file.keys() if tensors else []
                return key, {entry: file.get_tensor(entry) for entry in names}
        except (OSError, SafetensorError) as error:
            raise MixbitError(f"{str(path)!r} cannot be read: {error}; run the stage {verb!r} again") from error

    def _searched(self, recipe: Recipe) -> nn.Module | None:
        """The network as `search` left it, at the recipe's bits; None where the recipe is not of a search."""
        found = self._searched_recipe()
        if found is None:
            return None
        return mixbit.prepare_(self._restored(found, self._load_state(SEARCHED, "search")[1]), recipe, self.example)

    def _searched_recipe(self) -> Recipe | None:
        """The recipe that `search` found, where it is the folder's; else None."""
        verbs = [verb for verb, _ in self.config.stages]
        alone = len(verbs) == 1 and (self.folder / SEARCHED).exists()
        if "search" not in verbs and not alone:
            return None
        key, _ = self._load_state(SEARCHED, "search", tensors=False)
        found = Recipe.load(self._read("recipe.json", "search"))
        if key != self._trained_key(found):
            if alone:
                return None  # recipe.json was made anew by other means
            raise MixbitError(
                f"{str(self.folder / SEARCHED)!r} is of another network or recipe; run the stage 'search' again"
            )
        return found

    def retrain(self, options: dict[str, Any]) -> list[str]:
        """trained.safetensors, history.json, history.csv, thresholds.json: the network trained at the recipe's bits.

        Training goes on from the weights of a search where the recipe came from one. Whatever its quantizers learn, the
        file holds scales: kinds matter to training alone.
        """
        recipe, _ = self._recipe()
        mechanisms = _mechanisms(options)
        kinds = {name: options[name] for name in ("weight_quantizer", "act_quantizer")}
        if kinds["act_quantizer"] == "lsq+":
            raise MixbitError(
                "act_quantizer='lsq+': a recipe does not hold the offsets that it learns; expected another kind, or a "
                "training loop with mixbit.prepare_"
            )
        model = self._searched(recipe)
        if model is None:
            model = copy.deepcopy(self.model)
            if any(recipe[name].granularity == "per_tensor" for name in mixbit.layers(model, self.example).names):
                mixbit.fold_batchnorm_(model, self.example)  # one scale cannot take up a factor of each channel later
            mixbit.prepare_(model, recipe, self.example)
            mixbit.calibrate_(model, self.calibration, options["ranges"])
            if "rounding" in self.config.corrections:
                mixbit.optimize_rounding_(model, self.calibration)
        mixbit.prepare_(model, recipe, **kinds)
        fitting = self._fitting("retrain", options, self._trained_key(recipe), fingerprint(model))
        torch.manual_seed(self.config.seed)  # whatever the stages before it have drawn
        before = mixbit.retrain.threshold_histograms(model)
        history = mixbit.retrain.fit(model, self.training, mechanisms=mechanisms, **fitting)
        distances = {"before": before, "after": mixbit.retrain.threshold_histograms(model)}
        mixbit.prepare_(model, recipe, weight_quantizer="lsq", act_quantizer="lsq")
        self._finished(model, True)
        self._save_state(TRAINED, model, recipe)
        extra = self._save_trained_recipe(model, recipe)
        write_text(self.folder / "history.json", json.dumps(history.to_dict(), indent=1) + "\n")
        write_text(self.folder / "history.csv", history.to_csv())
        write_text(self.folder / "thresholds.json", json.dumps(distances, indent=1) + "\n")
        fitting["checkpoint"].unlink(missing_ok=True)
        return [TRAINED, "history.json", "history.csv", "thresholds.json", *extra]

    def _save_trained_recipe(self, model: nn.Module, recipe: Recipe) -> list[str]:
        """The recipe with the extra levels that training has given, if it has; the files."""
        maps = mixbit.search.extract(model).extra_maps
        names = [TRAINED_RECIPE, f"{Path(TRAINED_RECIPE).stem}.extra_levels.safetensors"]
        if not maps:
            for name in names:
                (self.folder / name).unlink(missing_ok=True)
            return []
        made_by = {**recipe.made_by, "retrained": self._trained_key(recipe)}
        trained = dataclasses.replace(recipe, extra_maps=maps, made_by=made_by)
        dataclasses.replace(trained, cost=self._cost_with_levels(trained)).save(self.folder / names[0])
        return names

    def _cost_with_levels(self, recipe: Recipe) -> dict[str, float]:
        """The recipe's cost with its extra levels, by unit; without those units that no table at hand tells."""
        tables = [make(self.model, self.example) for make in COSTS.values()]
        if (self.folder / "costs.json").exists():
            tables.append(CostTable.load(self.folder / "costs.json"))
        base = dataclasses.replace(recipe, extra_maps={})
        found = {}
        for table in tables:
            # Tables may share a unit: the one that is meant tells the cost that the recipe had without levels.
            with contextlib.suppress(KeyError):
                if math.isclose(table.total(base), recipe.cost[table.unit], rel_tol=1e-9):
                    found[table.unit] = table.total(recipe)
        return found

    def _trained_recipe(self, recipe: Recipe) -> Recipe:
        """The recipe that the trained network runs at: with the extra levels that training of this one has given."""
        path = self.folder / TRAINED_RECIPE
        if not (self._trains and path.exists()):
            return recipe
        trained = Recipe.load(path)
        return trained if trained.made_by.get("retrained") == self._trained_key(recipe) else recipe

    def _finished(self, model: nn.Module, integer: bool) -> nn.Module:
        """A trained network as it is shipped: normalizations folded, tensors of the integer network recorded."""
        mixbit.fold_batchnorm_(model, self.example)
        if integer:
            with contextlib.suppress(UnsupportedOperation):  # the fake-quantized network does without
                record_tensors_(model, self.calibration, self.example, quantized=True)
        return model

    @property
    def _trains(self) -> bool:
        """Whether results are of a retrained network: a run says so itself, a single verb looks at the folder."""
        verbs = [verb for verb, _ in self.config.stages]
        return "retrain" in verbs or (len(verbs) == 1 and (self.folder / TRAINED).exists())

    def _trained_key(self, recipe: Recipe) -> str:
        """What trained weights belong to: a network and its bits."""
        content = _recipe_content(recipe)
        maps = [content[kind] for kind in MAPS if kind in content]
        return _digest(fingerprint(self.model), content["layers"], recipe.tensors, *maps)

    def _trained(self, recipe: Recipe, integer: bool) -> nn.Module | None:
        """The network as `retrain` left it, or else `search`; None where this run does not train."""
        if not self._trains:
            model = self._searched(recipe)
            return None if model is None else self._finished(model, integer)
        key, state = self._load_state(TRAINED, "retrain")
        if key != self._trained_key(recipe):
            raise MixbitError(
                f"{str(self.folder / TRAINED)!r} was trained for another network or recipe; run the stage 'retrain' "
                "again, or delete it"
            )
        model = self._quantized(recipe, "maxabs", integer, corrected=False)
        if not integer:
            state = {name: value for name, value in state.items() if not name.startswith("mixbit_tensor_")}
        model.load_state_dict(state)
        return model

    def evaluate(self, options: dict[str, Any]) -> list[str]:
        """evaluation.json: the metric of the float, the fake-quantized and the integer network, and measured SQNR.

        Where the network was retrained these are the trained ones; then the metric before training stands beside them.
        The SQNR is that of the untrained network, which the predicted one speaks of.
        """
        test = self._test("evaluate")
        recipe, refinement = self._recipe()
        if refinement is not None:
            self.say(f"evaluate: the recipe as refined for {refinement['latency']}")
        metric = check_choice("metric", options["metric"], METRICS)
        partial = self.folder / ".evaluate.partial"
        integer = bool(options["integer"])
        trained = self._trained(recipe, integer)
        scores = self._scores(
            partial, _digest(options, _recipe_content(recipe), self.content, trained and fingerprint(trained))
        )
        untrained = functools.cache(lambda: self._quantized(recipe, options["method"], integer))
        networks: dict[str, Callable[[], nn.Module]] = {"float": lambda: self.model}
        if trained is not None:
            networks["before_training"] = untrained
        quantized = untrained if trained is None else lambda: trained
        networks["quantized"] = quantized
        if integer:
            networks["integer"] = lambda: _IntegerNetwork(quantized(), self.example)
        with reporter(self.progress, "evaluate") as report:
            values = {name: self._score(scores, name, network, metric, report) for name, network in networks.items()}
        measured = network_sqnr(self.model, recipe, self.calibration, quantized=untrained())
        document = {
            "metric": metric,
            "images": sum(batch_size(item) for item in test),
            **values,
            "predicted_sqnr_db": recipe.sqnr_db,
            "measured_sqnr_db": _plain(measured),
        }
        write_text(self.folder / "evaluation.json", json.dumps(document, indent=2) + "\n")
        partial.unlink(missing_ok=True)
        return ["evaluation.json"]

    def _integer_model(self, verb: str, method: str) -> nn.Module:
        """The network that is shipped: trained where it was, else calibrated at the recipe."""
        recipe, refinement = self._recipe()
        if refinement is not None:
            self.say(f"{verb}: the recipe as refined for {refinement['latency']}")
        trained = self._trained(recipe, True)
        return self._quantized(recipe, method, True) if trained is None else trained

    def export(self, options: dict[str, Any]) -> list[str]:
        """The files of the formats (see EXPORTS), and export.json: what is in them."""
        model = self._integer_model("export", options["method"])
        document: dict[str, Any] = {}
        made = []
        for name in options["formats"]:
            file, dialects = EXPORTS[name]
            dialect, path = options["dialect"] or dialects[0], self.folder / file
            entry: dict[str, Any] = {"format": name, "dialect": dialect}
            if name == "onnx":
                report = mixbit.export.onnx(
                    model,
                    self.example,
                    path,
                    dialect=dialect,
                    exact=bool(options["exact"]),
                    opset=options["opset"],
                    dynamic_batch=bool(options["any_batch"]),
                    compact=bool(options["compact"]),
                    force=True,
                    say=lambda limit: self.say(f"export: {limit}"),
                )
                entry |= {"opset": report.opset, "bytes": report.bytes._asdict(), "limits": list(report.limits)}
                entry["stored_bits"] = report.stored
            elif name == "program":
                program = mixbit.export.program(model, self.example, dialect, bool(options["any_batch"]))
                write_atomic(path, lambda file, program=program: torch.export.save(program, file))  # type: ignore[misc]
            elif name == "integer":
                mixbit.export.integer(model, self.example, path, force=True)
                entry["bytes"] = path.stat().st_size
            else:
                mixbit.export.package(model, self.example, path, dialect, bool(options["any_batch"]), force=True)
            document[file] = entry
            made.append(file)
        write_text(self.folder / "export.json", json.dumps(document, indent=2) + "\n")
        return [*made, "export.json"]

    def _artifacts(self, options: dict[str, Any]) -> list[Path]:
        """The files to verify: those named, or those that were exported here."""
        if options["artifacts"] is not None:
            paths = [Path(name) for name in options["artifacts"]]
        else:
            paths = [self.folder / name for name in json.loads(self._read("export.json", "export").read_text())]
        for path in paths:
            if not path.is_file():
                raise MixbitError(f"artifacts: there is no file {str(path)!r}")
        return paths

    def verify(self, options: dict[str, Any]) -> list[str]:
        """verification.json: each artifact against the integer reference, on test data where there are some."""
        model = self._integer_model("verify", options["method"])
        batches = _first_items(self.test or self.calibration, options["images"])
        known: dict[str, Any] = {}
        if (self.folder / "export.json").exists():
            known = json.loads((self.folder / "export.json").read_text())
        document: dict[str, Any] = {}
        for path in self._artifacts(options):
            # Packages of an older torch do not say which dialect they are; of this folder's own it is known.
            own = path.resolve().parent == self.folder.resolve()
            dialect = known.get(path.name, {}).get("dialect") if own else None
            report = mixbit.export.verify(path, model, batches, promise="one_code" if dialect == "pt2e" else None)
            self.say(f"verify: {path}: {report}")
            document[str(path) if options["artifacts"] else path.name] = _plain(report.to_dict())
        write_text(self.folder / VERIFICATION, json.dumps(document, indent=2) + "\n")
        return [VERIFICATION]

    def sweep(self, options: dict[str, Any]) -> list[str]:
        """sweep.json, sweep.csv and a recipe file for each point."""
        table = SensitivityTable.load(self._read("sensitivity.json", "analyze"))
        metric = check_choice("metric", options["metric"], METRICS)
        integer = bool(options["integer"])
        asked = self._costs(options, table)
        document: dict[str, Any] = {"costs": [name for name, _ in asked], "metric": None}
        scores: _Scores | None = None

        def score(name: str, quantized: Callable[[], nn.Module]) -> float:
            def network() -> nn.Module:
                return _IntegerNetwork(quantized(), self.example) if integer else quantized()

            assert scores is not None
            return self._score(scores, name, network, metric)

        def measure(recipe: Recipe) -> float:
            content = _recipe_content(recipe)
            layers = _digest(content["layers"], *(content[kind] for kind in MAPS if kind in content))
            return score(layers, lambda: self._quantized(recipe, options["ranges"], integer))

        if options["measure"]:
            test = self._test("sweep with measure")
            # The figures stay: a recipe of an earlier sweep, finished or not, is not measured again.
            key = _digest(metric, integer, options["ranges"], self.config.seed, self.content, versions())
            scores = self._scores(self.folder / ".sweep.measured", key)
            document |= {
                "metric": metric,
                "network": "integer" if integer else "quantized",
                "images": sum(batch_size(item) for item in test),
                "float": self._score(scores, "float", lambda: self.model, metric),
            }
        costs = {name: make(self.model, self.example) for name, make in COSTS.items()} | dict(asked)
        given = options["search"]
        if given is not None and given["channel_group"] is not None:
            for cost in costs.values():  # each point is audited in all of them
                for layer in cost.layers:
                    cost.check_channels(layer)
        trained: list[str] = []

        def searched(cost: CostTable, budget: float, name: str) -> tuple[Recipe, float | None]:
            file = f"{RECIPES}/{name}.safetensors"
            space = self._space(given)
            prepared = mixbit.prepare_(copy.deepcopy(self.model), space, self.example)
            least, most = mixbit.search.reachable(prepared, cost)
            if least > budget:
                narrowest = cost.uniform_recipe(min(space.act_precisions), min(space.weight_precisions))
                narrowest.report = {"feasible": False, "misses_by": cost.total(narrowest) - budget}
                return narrowest, None
            trained.append(file)
            network, recipe, key = self._searched_point(file, given, cost, min(budget, most))
            if scores is None:
                return recipe, None
            return recipe, score(key, lambda: self._finished(network(), integer))

        (self.folder / RECIPES).mkdir(exist_ok=True)
        points = mixbit.sweep(
            table,
            costs,
            over=[name for name, _ in asked],
            shares=options["shares"],
            methods=options["methods"],
            modes=options["modes"],
            metric=measure if options["measure"] else None,
            makers={} if given is None else {given["kind"]: searched},
            progress=self.progress,
            **self._minima(options),
        )
        names = {point.name: f"{RECIPES}/{point.name}.json" for point in points}
        files = [file for point in points for file in self._save_recipe(names[point.name], point.recipe)]
        earlier = self._manifest(self.folder / "sweep.manifest.json") or {"outputs": []}
        for name in earlier["outputs"]:
            if Path(name).parent == Path(RECIPES) and name not in (*files, *trained):
                (self.folder / name).unlink(missing_ok=True)
        document["uniform_8_8"] = {name: cost.uniform(8, 8) for name, cost in costs.items()}
        document["points"] = [{**point.to_dict(), "recipe": names[point.name]} for point in points]
        write_text(self.folder / "sweep.json", json.dumps(_plain(document), indent=2) + "\n")
        write_text(self.folder / "sweep.csv", points_as_csv(points))
        return ["sweep.json", "sweep.csv", *files, *trained]

    def _searched_point(
        self, file: str, options: dict[str, Any], cost: CostTable, budget: float
    ) -> tuple[Callable[[], nn.Module], Recipe, str]:
        """Makes a searched network; its recipe; what both depend on. Searched once, then read from the file."""
        space = self._space(options)
        key = _digest(
            options, cost.values.tolist(), budget, self._training_content, self.content, self.config.seed, versions()
        )
        path = self.folder / file
        if path.exists():
            with contextlib.suppress(MixbitError):
                found, state = self._load_state(file, "sweep")
                head, _, document = (found or "").partition(" ")
                if head == key:
                    recipe = Recipe.from_dict(json.loads(document))
                    widths = {name: state.get(f"{name}.weight_quantizer.bit_width") for name in recipe.layers}
                    recipe.channel_maps = {
                        name: bits.to(torch.uint8).numpy()
                        for name, bits in widths.items()
                        if bits is not None and bits.numel() > 1
                    }
                    recipe.report = {"feasible": True, "misses_by": 0.0}
                    return lambda: self._restored(recipe, state), recipe, key
        model, fitted, checkpoint = self._fit_search(Path(file).stem, options, space, cost, {"budget": budget})
        tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
        write_bytes(path, save(tensors, {"mixbit": f"{key} {json.dumps(fitted.recipe.to_dict())}"}))
        checkpoint.unlink(missing_ok=True)
        return lambda: self._restored(fitted.recipe, tensors), fitted.recipe, key

    def _restored(self, recipe: Recipe, state: dict[str, Tensor]) -> nn.Module:
        """A network prepared at a recipe, with the weights and grids of a state."""
        model = mixbit.prepare_(copy.deepcopy(self.model), recipe, self.example)
        model.load_state_dict(state)
        return model

    def _scores(self, path: Path, key: str) -> _Scores:
        return _Scores(path, self._manifest_of(path, key))

    def _score(
        self,
        scores: _Scores,
        name: str,
        network: Callable[[], nn.Module],
        metric: str,
        report: Progress = lambda done, total, text: None,
    ) -> float:
        """A metric on the test data, batch by batch as far as it is not in `scores`; the network is made if needed."""
        test = self._test(name)
        spans = [test] if metric in DETECTION_METRICS else [[item] for item in test]
        done, score = scores.state["done"], scores.state["score"]
        model: nn.Module | None = None
        for index in range(done.get(name, 0), len(spans)):
            model = network() if model is None else model
            images = sum(batch_size(item) for item in spans[index])
            score[name] = score.get(name, 0.0) + mixbit.evaluate(model, spans[index], metric) * images
            done[name] = index + 1
            write_text(scores.path, json.dumps(scores.state))
            report(index + 1, len(spans), name)
        return float(round(score[name] / sum(batch_size(item) for item in test), 6))

    @staticmethod
    def _manifest_of(path: Path, key: str) -> dict[str, Any]:
        try:
            state = json.loads(path.read_text())
            if state["key"] == key:
                return dict(state)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return {"key": key, "done": {}, "score": {}}

    def report(self, options: dict[str, Any]) -> list[str]:
        """report.html."""
        recipe, refinement = self._recipe()
        evaluation = self.folder / "evaluation.json"
        found = mixbit.layers(self.model, self.example)
        sweep, history = self.folder / "sweep.json", self.folder / "history.json"
        trained = history.exists() and self._trains
        distances = self.folder / "thresholds.json"
        costs = {name: make(self.model, self.example) for name, make in COSTS.items()}
        searched = self.folder / "search.json"
        made_by = "search" if self._searched_recipe() is not None else "assign"
        assigned = self._manifest(self.folder / f"{made_by}.manifest.json")
        for cost in [] if assigned is None else named_costs(assigned["options"]):
            if cost.name not in costs:
                costs[cost.name] = CostTable.load(self._read("costs.json", made_by))
        if refinement is not None:
            costs[refinement["latency"]] = CostTable.load(self._read("latency.json", "refine"))
        html = reports.render(
            title=options["title"] or self.config.model["source"],
            layers=[dataclasses.asdict(layer) for layer in found],
            float_modules=[module._asdict() for module in found.float_modules],
            table=SensitivityTable.load(self._read("sensitivity.json", "analyze")),
            costs=costs,
            recipe=self._trained_recipe(recipe) if trained else recipe,
            evaluation=json.loads(evaluation.read_text()) if evaluation.exists() else None,
            sweep=json.loads(sweep.read_text()) if sweep.exists() else None,
            training=json.loads(history.read_text()) if trained else None,
            distances=json.loads(distances.read_text()) if trained and distances.exists() else None,
            search=json.loads(searched.read_text()) if made_by == "search" else None,
            assignment=json.loads(self._read("assignment.json", "assign").read_text()),
            refinement=refinement,
            runtime=None if options["runtime"] is None else _runtime_profile(Path(options["runtime"])),
            options={verb: given for verb, given in self.config.stages} | {"versions": versions()},
        )
        write_text(self.folder / "report.html", html)
        return ["report.html"]


#: What the report reads of a profile of `mixbit-run`, and of each of its steps: texts, numbers above 0, other numbers.
_PROFILE = (
    ("isa",),
    ("threads", "batch", "peak_macs_per_second", "peak_bytes_per_second"),
    ("run_ms", "first_answer_ms", "arena_bytes", "weight_bytes"),
)
_PROFILE_STEP = (
    ("module", "node", "kernel"),
    (),
    ("value_bytes", "weight_bytes", "act_bits", "weight_bits", "ms", "macs", "mac_share", "bandwidth_share"),
)


def _runtime_profile(path: Path) -> dict[str, Any]:
    """What `mixbit-run --profile` wrote."""

    def check(found: Any, keys: tuple[tuple[str, ...], ...], where: str) -> None:
        for kind, names in zip(("a text", "a number above 0", "a number of at least 0"), keys, strict=True):
            for key in names:
                value: Any = found.get(key) if isinstance(found, dict) else None
                if kind == "a text":
                    fits = isinstance(value, str)
                else:
                    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
                    fits = fits and (value > 0 or (value == 0 and kind != "a number above 0"))
                if not fits:
                    raise MixbitError(f"{complaint}: {where}{key} is {value!r}, expected {kind}")

    complaint = f"runtime: {str(path)!r} is no profile of mixbit-run"
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise MixbitError(f"runtime: cannot read {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise MixbitError(f"{complaint}: {error}") from error
    check(document, _PROFILE, "")
    steps = document.get("steps")
    if not isinstance(steps, list):
        raise MixbitError(f"{complaint}: steps is {steps!r}, expected a list")
    for i, step in enumerate(steps):
        check(step, _PROFILE_STEP, f"steps[{i}].")
    return dict(document)


@dataclasses.dataclass
class _Scores:
    """Sums of scores over images by network, and where they are kept after every batch."""

    path: Path
    state: dict[str, Any]


class _IntegerNetwork(nn.Module):
    """The integer simulation of a quantized model as a module, for `evaluate`."""

    def __init__(self, quantized: nn.Module, example: Any) -> None:
        super().__init__()
        self.network = simulation(quantized, example)
        for name in ("decode", "coco_classes", "label_classes"):
            if hasattr(quantized, name):
                setattr(self, name, getattr(quantized, name))
        self.eval()

    def forward(self, x: Any) -> Any:
        """The network's outputs, a single one by itself."""
        outputs = self.network(x)
        return outputs[0] if len(outputs) == 1 else outputs


def _first_items(batches: list[Any], images: int | None) -> list[Any]:
    """Items that hold the first so many images, the last one cut."""
    found: list[Any] = []
    left = images
    for item in batches:
        if left is not None and left <= 0:
            break
        if left is not None and batch_size(item) > left:
            item = type(item)(part[:left] for part in item) if isinstance(item, (tuple, list)) else item[:left]
        found.append(item)
        left = None if left is None else left - batch_size(item)
    return found


def verified(folder: Path) -> bool:
    """Whether every artifact in verification.json keeps its promise."""
    document: dict[str, Any] = json.loads((folder / VERIFICATION).read_text())
    return all(report["in_class"] for report in document.values())


def _plain(value: Any) -> Any:
    """Values that JSON has: infinities as strings."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def run(config: Config, say: Say = lambda text: None, progress: Any = None) -> list[Path]:
    """Runs a pipeline; a run that was stopped goes on where it was.

    Args:
        config: See `Config`.
        say: Called with one line per stage.
        progress: As in `analyze`.

    Returns:
        The files of all stages.
    """
    return Pipeline(config, say, progress).run()

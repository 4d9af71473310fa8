"""The `mixbit` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mixbit.errors import MixbitError, did_you_mean

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    """Errors in one sentence, with the nearest valid value."""

    def error(self, message: str) -> NoReturn:
        """Exits with 2."""
        if "invalid choice" in message and "(choose from" in message:
            value = message.split("invalid choice: ")[1].split(" (choose")[0].strip("'\"")
            options = message.split("(choose from")[1].strip(" )").replace("'", "").split(", ")
            message += did_you_mean(value, options)
        raise _Usage(message)


class _Usage(Exception):
    """Bad command-line arguments."""


def key_value(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value as JSON where it is some."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: expected KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _listed(convert: Callable[[str], Any], expected: str) -> Callable[[str], list[Any]]:
    """Reads values with commas between them."""

    def read(text: str) -> list[Any]:
        try:
            return [convert(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}") from error

    return read


_bits = _listed(int, "whole numbers with commas, e.g. 2,4,8")
_numbers = _listed(float, "numbers with commas, e.g. 1,0.5,0.25")
_names = _listed(str, "names with commas")

#: What the named options may be; the stages check them.
_METRICS = "top1 (default), top5, or of detectors coco_map, ap50"
_RANGES = "mse (default), maxabs, qformat or percentile"
_COSTS = (
    "bops (default), ops, weight_memory, activation_memory, mapper:ARCHITECTURE[:OBJECTIVE], latency:FILE.csv or "
    "pulp:TARGET (a stand-in)"
)


def _parser() -> _Parser:
    parser = _Parser(
        prog="mixbit",
        description="Bits per layer: analyze, assign, search, refine, sweep, retrain, evaluate, export, verify, "
        "report, profile, map, cosearch.",
    )
    parser.add_argument("--version", action="store_true", help="print versions and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)

    def verb(name: str, text: str, data: bool = True) -> _Parser:
        sub: _Parser = verbs.add_parser(name, help=text, description=text)
        if data:
            sub.add_argument("model", help="zoo:NAME, torchvision:NAME or path/to/file.py:function")
            sub.add_argument("--weights", help="weights of the model (a file, or a name in the shipped data)")
            sub.add_argument(
                "--model-option",
                type=key_value,
                action="append",
                default=[],
                metavar="KEY=VALUE",
                help="argument of the model's builder, e.g. depth=56 (may be repeated)",
            )
            sub.add_argument("--data", required=True, help="calibration data: zoo:NAME or path/to/file.py:function")
            sub.add_argument("--images", type=int, help="at most so many calibration images")
            sub.add_argument("--batch", type=int, default=64, help="images per batch (default: 64)")
            sub.add_argument(
                "--corrections",
                type=lambda text: text.split(","),
                default=[],
                metavar="NAME,NAME,...",
                help="training-free: equalize (the same for every verb), rounding, bias",
            )
            sub.add_argument("--output", required=True, help="folder for the results")
            sub.add_argument("--seed", type=int, default=0, help="of random weights and orders (default: 0)")
            sub.add_argument("--force", action="store_true", help="replace results that exist")
        sub.add_argument("--debug", action="store_true", help="show a traceback on errors")
        return sub

    sub = verb("analyze", "SQNR of every layer at every width")
    sub.add_argument("--precisions", type=_bits, default=[2, 3, 4, 5, 6, 7, 8], metavar="B,B,...", help="widths")
    point = "where noise is measured: layer_output (default), tensor, network_output or cumulative"
    sub.add_argument("--point", default="layer_output", help=point)
    sub.add_argument("--joint", action="store_true", help="one width for both operands")
    sub.add_argument("--ranges", default="mse", help=f"how ranges are chosen: {_RANGES}")

    sub = verb("assign", "bits of every layer from a sensitivity table in the output folder")
    sub.add_argument("--method", default="greedy", help="greedy (default), threshold, ilp or aimet")
    sub.add_argument(
        "--mode", default="sqnr", help="shares of the threshold rule: sqnr (default), ops or weight_memory"
    )
    sub.add_argument("--cost", default="bops", help=f"what is saved: {_COSTS}")
    sub.add_argument("--target-sqnr-db", type=float, help="predicted SQNR to reach, in dB")
    sub.add_argument("--budget", type=float, help="largest total of the cost, in its unit")
    sub.add_argument("--budget-share", type=float, help="budget as a share of uniform 8/8")
    sub.add_argument("--max-drop", type=float, help="largest loss of the metric on --test, in percentage points")
    sub.add_argument("--metric", default="top1", help=f"metric for --max-drop: {_METRICS}")
    sub.add_argument("--test", help="labelled data for --max-drop")
    sub.add_argument("--test-images", type=int, help="at most so many test images")
    sub.add_argument("--first-last-min", type=int, help="least bits of the first and last layer")
    sub.add_argument("--depthwise-min", type=int, help="least bits of depthwise layers")
    sub.add_argument(
        "--rounding", help="of the grids: half_even (default) or half_up, what retraining with levels takes"
    )
    whole = "grids of weights with their lowest code"
    sub.add_argument("--whole-range", dest="narrow_range", action="store_false", default=None, help=whole)

    sub = verb("refine", "bits raised in the recipe in the output folder where the target is not slower for it")
    latency = "FILE.csv, pulp:TARGET (8bit, xpulpv2, xpulpnn, xpulpnn-mixed; a stand-in) or mapper:ARCHITECTURE:delay"
    sub.add_argument("--latency", required=True, help=f"latencies of layers: {latency}")
    sub.add_argument("--mode", default="strict", help="where it is faster: strict (default), or also no_slower")
    sub.add_argument("--widths", type=_bits, default=[2, 4, 8], metavar="B,B,...", help="widths beside the recipe's")
    sub.add_argument("--recipe", help="a recipe file to use instead of the folder's recipe.json")

    sub = verb("sweep", "recipes of several methods at many budgets, and which of them nothing beats")
    sub.add_argument("--methods", type=_names, metavar="NAME,NAME,...", help="methods of assign (default: all)")
    sub.add_argument("--modes", type=_names, metavar="NAME,NAME,...", help="modes of the threshold rule (default: all)")
    sub.add_argument(
        "--costs",
        type=_names,
        default=["bops"],
        metavar="NAME,NAME,...",
        help=f"costs that get budgets: {_COSTS}",
    )
    sub.add_argument("--shares", type=_numbers, metavar="S,S,...", help="budgets as shares of uniform 8/8")
    sub.add_argument("--test", help="labelled data to measure on")
    sub.add_argument("--test-images", type=int, help="at most so many test images")
    sub.add_argument("--metric", default="top1", help=_METRICS)
    sub.add_argument("--ranges", default="mse", help=f"how the measured networks are calibrated: {_RANGES}")
    sub.add_argument("--integer", action="store_true", help="measure the integer networks")
    sub.add_argument("--no-measure", dest="measure", action="store_false", help="predicted SQNR alone")
    sub.add_argument("--first-last-min", type=int, help="least bits of the first and last layer")
    sub.add_argument("--depthwise-min", type=int, help="least bits of depthwise layers")

    sub = verb("search", "bits learned together with the weights under a cost; goes on where it was stopped")
    _trained(sub)
    sub.add_argument("--kind", default="gates", help="gates (default), mixture or fractional")
    sub.add_argument("--precisions", type=_bits, default=[2, 4, 8], metavar="B,B,...", help="widths to choose from")
    sub.add_argument("--act-precisions", type=_bits, metavar="B,B,...", help="of activations, if they differ")
    sub.add_argument("--weight-precisions", type=_bits, metavar="B,B,...", help="of weights, if they differ")
    sub.add_argument("--tie", action="store_true", help="gates: the same width for a layer's weight and input")
    sub.add_argument(
        "--channel-group", type=int, metavar="G", help="gates: each G output channels choose their own bits"
    )
    sub.add_argument("--cost", default="bops", help=f"what is saved: {_COSTS}")
    sub.add_argument("--budget", type=float, help="largest total of the cost, in its unit")
    sub.add_argument("--budget-share", type=float, help="budget as a share of uniform 8/8")
    sub.add_argument("--strength", type=float, help="of the penalty, instead of a budget")
    sub.add_argument("--form", default="expected", help="of the penalty: expected (default), separate or joint")
    sub.add_argument("--start-epoch", type=int, help="until then all stays at the widest")
    sub.add_argument("--search-lr", type=float, help="of gates, logits or widths; raised where a gate could not close")

    sub = verb("retrain", "trains the network at the recipe in the output folder; goes on where it was stopped")
    _trained(sub)
    sub.add_argument("--recipe", help="a recipe file to use instead of the folder's recipe.json")
    kinds = "what training learns of the grids of"
    sub.add_argument(
        "--weight-quantizer", metavar="KIND", help=f"{kinds} weights: lsq (default), tqt, pact, fixed, ..."
    )
    sub.add_argument("--act-quantizer", metavar="KIND", help=f"{kinds} inputs: lsq (default), tqt, pact, fixed, ...")
    _mechanisms(sub)

    sub = verb("evaluate", "accuracy of the float, quantized and integer network at the recipe in the output folder")
    sub.add_argument("--test", required=True, help="labelled data: zoo:NAME or path/to/file.py:function")
    sub.add_argument("--test-images", type=int, help="at most so many test images")
    sub.add_argument("--metric", default="top1", help=_METRICS)
    sub.add_argument("--recipe", help="a recipe file to use instead of the folder's recipe.json")
    sub.add_argument("--no-integer", action="store_true", help="leave out the integer simulation")

    sub = verb("export", "the integer network at the recipe in the output folder as ONNX, a program or packages")
    sub.add_argument(
        "--formats", type=_names, metavar="NAME,NAME,...", help="onnx (default), program, package, integer"
    )
    sub.add_argument("--dialect", help="of onnx: qdq (default) or qonnx; of the others: mixbit (default) or pt2e")
    sub.add_argument("--plain", dest="exact", action="store_false", help="onnx: patterns that more compilers fuse")
    sub.add_argument("--opset", type=int, help="onnx: an older one than the weights want stores them wider")
    sub.add_argument("--compact", action="store_true", help="onnx: patterns that recur as functions")
    sub.add_argument("--one-image", dest="any_batch", action="store_false", help="a batch of one instead of any")
    sub.add_argument("--recipe", help="a recipe file to use instead of the folder's recipe.json")

    sub = verb("verify", "exported files against the integer reference; exits 1 where one breaks its promise")
    sub.add_argument("--artifacts", type=_names, metavar="FILE,FILE,...", help="default: what export made here")
    sub.add_argument("--test", help="images to compare on, with labels for accuracy (default: the calibration data)")
    sub.add_argument("--verify-images", type=int, default=64, metavar="N", help="at most so many (default: 64)")
    sub.add_argument("--recipe", help="a recipe file to use instead of the folder's recipe.json")

    sub = verb("report", "one HTML page of the results in the output folder")
    sub.add_argument("--title", help="of the page (default: the model)")
    sub.add_argument("--runtime", metavar="FILE", help="what `mixbit-run PACKAGE --profile FILE` wrote, for a roofline")

    sub = verb("bench", "the ops against copies, torch.compile and other libraries, side by side", data=False)
    sub.add_argument("cases", nargs="*", metavar="CASE", help="what to measure (default: all; see --list)")
    sub.add_argument("--list", action="store_true", help="list cases, tensors and contenders, and exit")
    sub.add_argument("--tensor", action="append", metavar="NAME", help="tensor to measure on (may be repeated)")
    sub.add_argument("--dtype", default="float32")
    sub.add_argument("--bits", type=int, default=4)
    sub.add_argument("--threads", type=int, default=1)
    sub.add_argument("--repeats", type=int, default=20)
    sub.add_argument("--contenders", type=_names, metavar="NAME,NAME,...", help="default: all")
    sub.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    sub.add_argument("--refcheck", action="store_true", help="compare every result with the reference")
    sub.add_argument("--json", metavar="FILE", help="write the rows as JSON")
    sub.add_argument("--csv", metavar="FILE", help="write the rows as CSV")

    sub = verb("profile", "latency of every layer on this machine at every pair of widths, as a CSV", data=False)
    sub.add_argument("model", help="zoo:NAME, torchvision:NAME or path/to/file.py:function")
    sub.add_argument(
        "--model-option",
        type=key_value,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of the model's builder, e.g. depth=56 (may be repeated)",
    )
    sub.add_argument("--input", type=_bits, metavar="C,H,W", help="sizes of one image (default: 3,224,224)")
    sub.add_argument("--data", help="instead of --input, data whose items the model takes")
    sub.add_argument("--threads", type=int, default=1, help="of the runtime (default: 1)")
    sub.add_argument("--repeats", type=int, default=30, help="timed runs of each layer at each pair (default: 30)")
    sub.add_argument("--isa", help="cap of the instruction set: scalar, avx2, avx512, vnni or amx")
    sub.add_argument("--cold", action="store_true", help="weights leave the second-level cache before each run")
    sub.add_argument("--output", required=True, metavar="FILE.csv", help="the table; a .json beside it has the spread")
    sub.add_argument("--force", action="store_true", help="replace results that exist")

    _hardware(verb)

    sub = verb("run", "the whole pipeline of a config file; goes on where it was stopped", data=False)
    sub.add_argument("config", help="YAML file with model, data, output, seed, stages")
    sub.add_argument("--output", help="folder for the results, instead of the config's")
    return parser


def _trained(sub: Any) -> None:
    """Options of the verbs that train."""
    sub.add_argument("--training", required=True, help="data to train on: zoo:NAME or path/to/file.py:function")
    sub.add_argument("--training-images", type=int, help="at most so many training images")
    sub.add_argument("--training-batch", type=int, default=128, help="images of a step (default: 128)")
    sub.add_argument("--augment", help="crop_flip (default: nothing)")
    sub.add_argument("--epochs", type=int, default=3, help="passes over the training images (default: 3)")
    sub.add_argument("--lr", type=float, help="of the weights, at the start (default: 0.01)")
    sub.add_argument("--scale-lr", type=float, help="of scales, at the start (default: a tenth of --lr)")
    sub.add_argument("--weight-decay", type=float, help="of the weights (default: 1e-4)")
    sub.add_argument(
        "--distill", type=float, metavar="SHARE", help="of the loss: distance to the float network, 0 to 1"
    )
    sub.add_argument("--temperature", type=float, help="of the distillation (default: 4)")
    sub.add_argument("--clip-norm", type=float, help="largest norm of the gradient")
    sub.add_argument("--bf16", action="store_true", help="multiply in bfloat16")
    sub.add_argument("--no-reestimate", dest="reestimate", action="store_false", help="keep running batch statistics")
    sub.add_argument("--ranges", default="mse", help=f"of the network that training starts from: {_RANGES}")


def _mechanisms(sub: Any) -> None:
    """What `retrain` may do against weights that switch between levels."""
    numbers = lambda text: [float(part) for part in text.split(",")]  # noqa: E731
    sub.add_argument("--threshold-aware", metavar="SHAPE", help="smaller steps near thresholds: step, linear or gauss")
    sub.add_argument("--alpha", type=float, help="their multiplier at a threshold (default: 0.1)")
    sub.add_argument("--rho", type=float, help="their reach in steps of the grid (default: 0.125)")
    sub.add_argument("--on-grad", action="store_true", help="they scale gradients instead of updates")
    sub.add_argument("--count", metavar="SCORE", help="count level switches: adj, pair, osc or ema")
    at = "extra levels for weights that switch most, after these shares of the run"
    sub.add_argument("--assign-at", type=numbers, metavar="SHARE,...", help=at)
    sub.add_argument("--fraction", type=float, help="of each layer's weights (default: 0.2)")
    sub.add_argument("--rate", type=float, help="instead of --fraction: switches a step")
    sub.add_argument("--per", help="whether --fraction is of each layer (default) or of the network")
    sub.add_argument("--max-bits", type=int, help="most bits of a weight with extra levels (default: 4)")
    sub.add_argument("--group", type=int, help="consecutive input channels that get levels together (default: 1)")
    sub.add_argument("--by", help="what ranks weights: score (default) or score_gradient, times the squared gradient")
    sub.add_argument("--extra", help="weights with levels: nested (default) go on, mid_frozen are held at the new one")
    sub.add_argument("--window", type=float, help="epochs before an assignment that count (default: 1)")
    sub.add_argument("--freeze", type=numbers, metavar="FIRST,LAST", help="thresholds of iterative freezing")
    sub.add_argument("--freeze-begin", type=float, metavar="SHARE", help="of the run before it (default: 0.25)")
    sub.add_argument("--freeze-momentum", type=float, help="of its averages (default: 0.01)")
    sub.add_argument("--dampen", type=float, metavar="STRENGTH", help="of dampening, at the end")
    sub.add_argument("--dampen-begin", type=float, metavar="SHARE", help="of the run before it (default: 0.25)")


def _hardware(verb: Any) -> None:
    """The verbs about accelerators; they need a model's shapes and no data."""
    for name, text, seed in (
        ("map", "the proven best mapping of every layer on an accelerator", 0),
        ("cosearch", "Pareto points of accuracy against mapped cost, with NSGA-II", 42),
    ):
        sub = verb(name, text, data=False)
        sub.add_argument("model", nargs="?", help="zoo:NAME, torchvision:NAME or path/to/file.py:function")
        sub.add_argument("--weights", help="weights of the model (a file, or a name in the shipped data)")
        sub.add_argument("--model-option", type=key_value, action="append", default=[], metavar="KEY=VALUE")
        sub.add_argument("--input", type=_bits, default=[3, 224, 224], metavar="C,H,W", help="sizes of one image")
        sub.add_argument("--workload", metavar="FILE", help="a workload.json of an earlier run instead of a model")
        sub.add_argument("--depthwise-as-full", action="store_true", help="as the published numbers count them")
        sub.add_argument("--arch", required=True, help="a shipped one (eyeriss, simba, ...), or a YAML or JSON file")
        sub.add_argument("--objective", default="edp", help="energy, delay, edp or last_level_accesses")
        sub.add_argument("--threads", type=int, help="default: all processors")
        sub.add_argument("--output", required=True, help="folder for the results")
        sub.add_argument("--seed", type=int, default=seed)
        sub.add_argument("--force", action="store_true", help="replace results that exist")
        if name == "map":
            sub.add_argument("--act", type=int, default=8, help="bits of all inputs")
            sub.add_argument("--weight", type=int, default=8, help="bits of all weights")
            sub.add_argument("--recipe", help="a recipe file instead of --act and --weight")
            sub.add_argument("--against", type=int, help="bits that the saving is shown against (default: the word's)")
            continue
        sub.add_argument("--sensitivity", metavar="FILE", help="sensitivity.json: searches on the predicted SQNR")
        sub.add_argument("--accuracy", metavar="FILE.py:FUNCTION", help="a function of a recipe: more is better")
        sub.add_argument("--widths", type=_bits, default=[2, 3, 4, 5, 6, 7, 8], metavar="B,B,...")
        sub.add_argument("--engine", default="standard", help="standard or published")
        sub.add_argument("--generations", type=int, default=25)
        sub.add_argument("--parents", type=int, help="instead of the engine's")
        sub.add_argument("--offspring", type=int, help="instead of the engine's")
        sub.add_argument("--exact", action="store_true", help="the exact front beside it (with --sensitivity)")
        sub.add_argument("--tolerance", type=float, default=0.0, help="of the exact front's costs; 0 is exact")


#: Result files of each verb, for the check against overwriting.
_RESULTS = {
    "analyze": "sensitivity.json",
    "assign": "recipe.json",
    "refine": "refinement.json",
    "search": "recipe.json",
    "sweep": "sweep.json",
    "retrain": "trained.safetensors",
    "evaluate": "evaluation.json",
    "export": "export.json",
    "verify": "verification.json",
    "report": "report.html",
}


def _config(arguments: argparse.Namespace) -> dict[str, Any]:
    """The pipeline document of a single verb."""
    given = vars(arguments)
    verb = arguments.verb
    from mixbit.pipeline import STAGES

    options = {k: given[k] for k in STAGES[verb] if k in given and given[k] is not None}
    if verb == "evaluate":
        options["integer"] = not arguments.no_integer
    if verb == "verify":
        options["images"] = arguments.verify_images
    test = given.get("test")
    return {
        "model": {
            "source": arguments.model,
            "weights": arguments.weights,
            "options": dict(arguments.model_option),
        },
        "data": {
            "calibration": {"source": arguments.data, "images": arguments.images, "batch": arguments.batch},
            **({"test": {"source": test, "images": given.get("test_images")}} if test else {}),
            **({"training": _training(arguments)} if verb in ("search", "retrain") else {}),
        },
        "output": arguments.output,
        "seed": arguments.seed,
        "corrections": arguments.corrections,
        "stages": [{verb: options}],
    }


def _training(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "source": arguments.training,
        "images": arguments.training_images,
        "batch": arguments.training_batch,
        "augment": arguments.augment,
    }


def _run(arguments: argparse.Namespace) -> int:
    from mixbit.pipeline import Config, Pipeline, verified
    from mixbit.recipe import Recipe

    if arguments.verb == "run":
        config = Config.load(arguments.config)
        if arguments.output:
            import dataclasses

            config = dataclasses.replace(config, output=Path(arguments.output))
    else:
        config = Config.from_dict(_config(arguments))
        result = config.output / _RESULTS[arguments.verb]
        if result.exists() and not arguments.force:
            raise MixbitError(f"{str(result)!r} exists; use --force to replace it, or another --output")
        if arguments.verb in ("evaluate", "retrain", "export", "verify") and arguments.recipe:
            recipe = Recipe.load(arguments.recipe)
            config.output.mkdir(parents=True, exist_ok=True)
            recipe.save(config.output / "recipe.json")
    pipeline = Pipeline(config, say=lambda text: print(f"mixbit {text}", flush=True), progress=True)
    if arguments.verb != "run" and arguments.force:
        (config.output / f"{arguments.verb}.manifest.json").unlink(missing_ok=True)
    made = pipeline.run()
    _summary(config.output, trained="retrain" in [verb for verb, _ in config.stages])
    print("\n".join(f"wrote {path}" for path in made))
    if "verify" in [verb for verb, _ in config.stages] and not verified(config.output):
        print("mixbit: an artifact breaks its promise; see verification.json", file=sys.stderr)
        return 1
    return 0


def _bench(arguments: argparse.Namespace) -> None:
    """Measures, prints a table for each case and tensor, and writes the files asked for."""
    from rich.console import Console
    from rich.table import Table

    from mixbit import bench
    from mixbit.errors import check_choice
    from mixbit.files import write_text

    console = Console()
    if arguments.list:
        for title, entries in (("case", bench.CASES), ("contender", bench.CONTENDERS)):
            table = Table(title, "about")
            for name, entry in entries.items():
                table.add_row(name, entry.about)
            console.print(table)
        console.print("tensors:", ", ".join(f"{name} {shape}" for name, (shape, _) in bench.TENSORS.items()))
        return
    for case in arguments.cases:
        check_choice("case", case, bench.CASES)
    outcome = bench.Outcome()
    for case in arguments.cases or bench.CASES:
        tensors = ["ResNet-18"] if case == "weights" else arguments.tensor or ["activations", "weights"]
        for tensor in tensors:
            found = bench.race(
                case,
                "weights" if case == "weights" else tensor,
                dtype="float32" if case == "weights" else arguments.dtype,
                bits=arguments.bits,
                threads=arguments.threads,
                contenders=arguments.contenders,
                repeats=arguments.repeats,
                compiled=not arguments.no_compile,
                refcheck=arguments.refcheck,
                say=lambda text: print(f"mixbit bench: {text}", flush=True),
            )
            outcome.rows += found.rows
            outcome.skipped += found.skipped
            limit = bench.CASES[case].limit
            title = f"{case} on {tensor}, {found.rows[0].dtype}, {arguments.threads} thread(s); ratios to {limit}"
            columns = ["contender", "least us", "median us", "ratio", "median ratio", "page faults"]
            table = Table(*columns, *(["away from the reference"] * arguments.refcheck), title=title)
            for row in sorted(found.rows, key=lambda r: r.ratio):
                cells = [f"{row.microseconds:.1f}", f"{row.median_microseconds:.1f}"]
                cells += [f"{row.ratio:.2f}", f"{row.median_ratio:.2f}", f"{row.page_faults:.0f}"]
                if arguments.refcheck:
                    shares = row.difference or {}
                    cells.append(", ".join(f"{key} {share:.2%}" for key, share in shares.items()))
                table.add_row(row.contender, *cells)
            console.print(table)
    for path, text in ((arguments.json, bench.rows_as_json), (arguments.csv, bench.rows_as_csv)):
        if path:
            print(f"wrote {write_text(path, text(outcome))}")


def _profile(arguments: argparse.Namespace) -> None:
    """Measures, prints what the widths cost in each layer, and writes the table with a manifest."""
    import torch
    from rich.console import Console
    from rich.table import Table

    import mixbit
    from mixbit.files import file_digest, write_text
    from mixbit.pipeline import versions
    from mixbit.report import number
    from mixbit.sources import load_data, load_model

    if arguments.input is not None and arguments.data is not None:
        raise MixbitError("--input and --data: expected one of them")
    sizes = arguments.input or [3, 224, 224]
    if min(sizes) < 1:
        raise MixbitError(f"--input {','.join(map(str, sizes))}: expected sizes of at least 1, e.g. 3,224,224")
    model = load_model(arguments.model, None, dict(arguments.model_option))
    example = load_data(arguments.data, 1)[0] if arguments.data else torch.zeros(1, *sizes)
    options = {k: getattr(arguments, k) for k in ("threads", "repeats", "isa", "cold", "force")}
    try:
        found = mixbit.profile(model, example, arguments.output, progress=True, **options)
    except RuntimeError as error:
        where = f"--data {arguments.data}" if arguments.data else f"--input {','.join(map(str, sizes))}"
        raise MixbitError(f"{where} does not fit the model: {error}") from error
    costs = found.costs(model, example)
    widths = (2, 4, 8)
    title = f"{found.machine['processor']}, {found.machine['isa']} kernels, {found.machine['threads']} thread(s)"
    table = Table("layer", *(f"{w} weight bits" for w in widths), title=f"{title}; {found.unit}, any act bits")
    for name in costs.layers:
        table.add_row(name, *(number(costs.entry(name, 8, w)) for w in widths))
    table.add_row("total", *(number(costs.uniform(8, w)) for w in widths))
    Console().print(table)
    output = Path(arguments.output)
    files = [output, output.with_suffix(".json")]
    manifest = output.with_suffix(".manifest.json")
    document = {
        "verb": "profile",
        "options": {k: v for k, v in vars(arguments).items() if k not in ("debug", "force", "verb", "version")},
        "versions": versions(),
        "outputs": {file.name: file_digest(file) for file in files},
    }
    write_text(manifest, json.dumps(document, indent=2) + "\n")
    print("\n".join(f"wrote {file}" for file in [*files, manifest]))


def _summary(folder: Path, trained: bool) -> None:
    """A table of what is known so far."""
    from rich.console import Console
    from rich.table import Table

    from mixbit.pipeline import refinement_of
    from mixbit.recipe import Recipe
    from mixbit.report import number
    from mixbit.tables import channel_counts, mean_weight_bits

    recipe_file, evaluation_file, sweep_file = (folder / f"{n}.json" for n in ("recipe", "evaluation", "sweep"))
    console = Console()
    if recipe_file.exists():
        recipe = Recipe.load(recipe_file)
        table = Table("layer", "weight bits", "act bits", title="recipe")
        for name, precision in recipe.layers.items():
            weight, act = ("float" if b is None else str(b) for b in (precision.weight, precision.act))
            if counts := channel_counts(recipe, name):
                weight = f"{mean_weight_bits(recipe, name):.3g} ({', '.join(str(b) for b in counts)} by channel)"
            table.add_row(name, weight, act)
        console.print(table)
        for unit, value in recipe.cost.items():
            console.print(f"cost: {number(value)} {unit}")
    refinement = refinement_of(folder)
    if refinement is not None:
        title = f"refined for {refinement['latency']} ({refinement['mode']})"
        table = Table("layer", "act/weight bits", "raised to", "before", "after", title=title)
        raised = {row["layer"]: row for row in refinement["raised"]}
        for row in refinement["layers"]:
            if row["layer"] in raised:
                bits = ["{act}/{weight}".format(**raised[row["layer"]][end]) for end in ("from", "to")]
                table.add_row(row["layer"], *bits, number(row["before"]), number(row["after"]))
        console.print(table)
        said = [f"{number(refinement[f'latency_{key}'])} {key}" for key in ("before", "after")]
        if refinement["latency_8bit"] is not None:
            said.append(f"{number(refinement['latency_8bit'])} at uniform 8 bit")
        console.print(f"latency: {', '.join(said)} ({refinement['unit']})")
    if trained:
        table = Table("epoch", "mean loss", "learning rate at its end", title="training")
        for index, epoch in enumerate(json.loads((folder / "history.json").read_text())["epochs"], 1):
            table.add_row(str(index), f"{epoch['loss']:.4f}", f"{epoch['lr']:.3g}")
        console.print(table)
        if (folder / "trained_recipe.json").exists():
            for unit, value in Recipe.load(folder / "trained_recipe.json").cost.items():
                console.print(f"cost with extra levels, their index not counted: {number(value)} {unit}")
    if evaluation_file.exists():
        evaluation = json.loads(evaluation_file.read_text())
        table = Table("network", str(evaluation["metric"]), title=f"{evaluation['images']} images")
        for name in ("float", "before_training", "quantized", "integer"):
            if name in evaluation:
                table.add_row(name.replace("_", " "), f"{evaluation[name]:.2f}")
        console.print(table)
        predicted, measured = (evaluation[k] for k in ("predicted_sqnr_db", "measured_sqnr_db"))
        shown = [v if isinstance(v, str) or v is None else f"{v:.1f} dB" for v in (predicted, measured)]
        console.print(f"SQNR predicted (an estimate): {shown[0]}, measured: {shown[1]}")
    if sweep_file.exists():
        sweep = json.loads(sweep_file.read_text())
        for cost in sweep["costs"]:
            # Where something was measured that front counts; an estimate has to do where nothing was.
            figure, head = (
                ("measured", str(sweep["metric"])) if sweep["metric"] else ("predicted_sqnr_db", "estimate, dB")
            )
            table = Table("recipe", f"{cost} / uniform 8/8", head, title=f"Pareto front over {cost}")
            for point in sorted(sweep["points"], key=lambda p: -p["shares"][cost]):
                if point["on_front"][cost][figure]:
                    table.add_row(point["name"], f"{point['shares'][cost]:.3f}", f"{float(point[figure]):.2f}")
            console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        0; 1 where an artifact breaks its promise (`verify`); or 2 on bad input (one sentence on standard error).
    """
    arguments: argparse.Namespace | None = None
    try:
        arguments = _parser().parse_args(argv)
        if arguments.version:
            from mixbit.pipeline import versions

            print(" ".join(f"{name} {version}" for name, version in versions().items()))
            return 0
        if arguments.verb is None:
            _parser().print_help()
            return 0
        if arguments.verb in ("map", "cosearch"):
            from mixbit.cli import hardware

            hardware.run_map(arguments) if arguments.verb == "map" else hardware.run_cosearch(arguments)
        elif arguments.verb == "bench":
            _bench(arguments)
        elif arguments.verb == "profile":
            _profile(arguments)
        else:
            return _run(arguments)
        return 0
    except _Usage as error:
        print(f"mixbit: {error}", file=sys.stderr)
        return 2
    except (ValueError, KeyError, OSError) as error:
        if arguments is not None and getattr(arguments, "debug", False):
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"mixbit: {' '.join(str(text).split())}", file=sys.stderr)
        return 2

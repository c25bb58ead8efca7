"""The options of the commands, declared once; None means "not given", so that a recipe can be overridden."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from loraforge.cli._complete import complete_method, complete_preset, complete_setting

# Panels of `--help`.
RANKS, DATA, ITERATION, FILES, OUTPUT = "Rank", "Model and data", "IterIS", "Files", "Output"

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print details, one line a module.")]
Debug = Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")]

Adapters = Annotated[list[str], typer.Argument(metavar="ADAPTER", help="Adapter folder.", show_default=False)]
AdaptersOrRecipe = Annotated[
    list[str] | None,
    typer.Argument(metavar="ADAPTER", help="Adapter folders, in order; or named by --recipe."),
]
Out = Annotated[str | None, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.", show_default=False)]
Overwrite = Annotated[bool | None, typer.Option("--overwrite", help="Replace an existing output.")]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="Seed of every random draw.", show_default="0; calibrated methods: 42"),
]
DemoSeed = Annotated[int | None, typer.Option("--seed", help="Seed of every random draw.", show_default="0")]
Device = Annotated[
    str | None, typer.Option("--device", metavar="auto|cpu|cuda[:i]", help="Where to compute.", show_default="auto")
]

Method = Annotated[
    str | None,
    typer.Option(
        "--method", "-m", metavar="NAME", help="Merge method; see 'loraforge methods'.", autocompletion=complete_method
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="W,W,...",
        help="One weight an adapter: any sign for sums, 0 or more for calibrated methods.",
        show_default="the method's",
    ),
]
Weight = Annotated[float | None, typer.Option("--weight", metavar="W", help="For two adapters: the weights W and 1-W.")]
Rank = Annotated[int | None, typer.Option("--rank", min=1, help="Largest output rank a module.")]
Energy = Annotated[
    float | None,
    typer.Option("--energy", metavar="T", help="Smallest rank that keeps this share of the energy (0, 1]."),
]
Nuclear = Annotated[
    float | None, typer.Option("--nuclear", metavar="T", help="Smallest rank that keeps this share of the sum of S.")
]
Ratio = Annotated[
    float | None, typer.Option("--ratio", metavar="T", help="Keep singular values above the largest over T.")
]
FroError = Annotated[
    float | None, typer.Option("--fro-error", metavar="E", help="Smallest rank with this relative Frobenius error.")
]
Budget = Annotated[
    int | None,
    typer.Option("--budget", min=1, metavar="P", help="Parameters shared by all modules, dealt out by worth."),
]
MinRank = Annotated[int | None, typer.Option("--min-rank", min=1, help="Lower bound of the rank.")]
MaxRank = Annotated[int | None, typer.Option("--max-rank", min=1, help="Upper bound of the rank.")]
UniformRank = Annotated[
    bool | None, typer.Option("--uniform-rank/--no-uniform-rank", help="One rank for all modules.", show_default=False)
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"] | None,
    typer.Option("--dtype", help="Of the written factors; arithmetic is fp32/fp64.", show_default="auto"),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format", metavar="auto|peft|kohya|diffusers", help="Of the written files.", show_default="that of the inputs"
    ),
]

OutputKind = Annotated[
    Literal["adapter", "model"] | None,
    typer.Option("--output-kind", help="An adapter, or the base with the update added.", show_default="adapter"),
]
Resume = Annotated[
    bool | None,
    typer.Option("--resume", help="Continue an interrupted run; keep what is done if this one is interrupted."),
]
Post = Annotated[
    Literal["none", "iso"] | None,
    typer.Option("--post", help="Flatten the spectrum of the result after the rank rule.", show_default="none"),
]
Stats = Annotated[
    list[str] | None,
    typer.Option(
        "--stats",
        metavar="[NAME=]FILE",
        help="Input statistics of one adapter (repeat), from collect-stats.",
        show_default=False,
    ),
]
IgnoreUnknown = Annotated[
    bool | None, typer.Option("--ignore-unknown", help="Leave out keys that are no part of an adapter.")
]

Base = Annotated[str | None, typer.Option("--base", metavar="MODEL", help="Base model; only for methods that need it.")]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        metavar="[NAME=]FILE",
        help="Calibration data of one adapter (repeat): by adapter name, or in the adapters' order.",
        show_default=False,
    ),
]
Samples = Annotated[
    int | None, typer.Option("--samples", min=1, help="Samples a calibration file.", show_default="256")
]
MaxLength = Annotated[int | None, typer.Option("--max-length", min=1, help="Longest sample in tokens.")]
BatchTokens = Annotated[int | None, typer.Option("--batch-tokens", min=1, help="Tokens a forward pass; bounds memory.")]
Template = Annotated[
    str | None,
    typer.Option("--template", metavar="TEXT", help="Text of a sample from its fields, as '{question} {answer}'."),
]

Recipe = Annotated[
    str | None, typer.Option("--recipe", metavar="FILE.yaml", help="All of this as a file; options override it.")
]
Preset = Annotated[
    str | None,
    typer.Option("--preset", metavar="NAME", help="Settings that come with loraforge.", autocompletion=complete_preset),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Parameter of the method (repeat); see 'loraforge methods NAME'.",
        autocompletion=complete_setting,
        show_default=False,
    ),
]
Mats = Annotated[bool | None, typer.Option("--mats/--no-mats", help="Same as --set use_mats.", show_default=False)]
Camr = Annotated[bool | None, typer.Option("--camr/--no-camr", help="Same as --set use_camr.", show_default=False)]
Dcs = Annotated[bool | None, typer.Option("--dcs/--no-dcs", help="Same as --set use_dcs.", show_default=False)]
MaxIter = Annotated[int | None, typer.Option("--max-iter", help="Same as --set max_iter.", show_default=False)]
Init = Annotated[
    str | None, typer.Option("--init", metavar="sweep|adapters", help="Same as --set init.", show_default=False)
]
Verify = Annotated[bool | None, typer.Option("--verify/--no-verify", help="Same as --set verify.", show_default=False)]


# The same as `--set NAME=VALUE`, for the parameters of the data-free methods that are asked for most.
def _sugar(name: str, text: str) -> Any:
    return typer.Option(name, help=text, show_default=False)


Density = Annotated[float | None, _sugar("--density", "Share of the entries kept (ties, dare, breadcrumbs, ...).")]
Scope = Annotated[str | None, _sugar("--scope", "global | module: what thresholds or angles are taken over.")]
CommonFraction = Annotated[float | None, _sugar("--common-fraction", "Share of common directions (iso-cts).")]
MeanOver = Annotated[str | None, _sugar("--mean-over", "Average over support | full (iso-*).")]
Alpha = Annotated[float | None, _sugar("--alpha", "Strength of the merged update (iso-*).")]
TargetNorm = Annotated[str | None, _sugar("--target-norm", "none | nuclear | fro | mean-adapter (iso-*).")]
Keep = Annotated[str | None, _sugar("--keep", "largest | smallest entries stay (iso-iasad).")]
PruneLevel = Annotated[str | None, _sugar("--prune-level", "row | element (iso-iasad).")]
Iters = Annotated[int | None, _sugar("--iters", "Rounds of the split (iso-iasad).")]
Sparsity = Annotated[float | None, _sugar("--sparsity", "Compression rate of the split (iso-iasad).")]
RankRatio = Annotated[float | None, _sugar("--rank-ratio", "Low-rank share of the split (iso-iasad).")]
RankBasis = Annotated[str | None, _sugar("--rank-basis", "budget | lora (iso-iasad).")]
Center = Annotated[str | None, _sugar("--center", "none | mean | drop-mean (iso-iasad).")]
T = Annotated[float | None, _sugar("--t", "Place between the two adapters, 0 to 1 (slerp).")]
Ridge = Annotated[float | None, _sugar("--ridge", "Regularisation (wudi).")]
DocumentCompat = Annotated[
    bool | None,
    typer.Option("--document-compat", help="rsvd as its document's code does it, step by step.", show_default=False),
]

OnMissing = Annotated[
    Literal["zero", "present", "error"] | None,
    typer.Option("--on-missing", help="What a module counts that only some adapters have.", show_default="zero"),
]
HeadsFrom = Annotated[
    str | None, typer.Option("--from", metavar="NAME", help="Adapter whose fully trained heads go into the output.")
]
Force = Annotated[
    bool | None, typer.Option("--force", help="Merge adapters whose base or task type differ.", show_default=False)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan; write nothing.")]
Report = Annotated[str | None, typer.Option("--report", metavar="FILE.html", help="Also write an HTML report.")]

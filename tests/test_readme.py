"""README's commands run, its table is the program's, and its figures are those of benchmarks/results."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from loraforge.cli.app import app
from loraforge.merging.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = ["[PAD]", "[UNK]", *"the a cat dog sat ran on under mat tree fast slow happy sad is was".split()]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def between(marker: str) -> str:
    return re.search(rf"<!-- {marker}:start -->\n(.*?)<!-- {marker}:end -->", README, re.DOTALL).group(1).strip()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What README's commands expect: base, loras/a, loras/b, a.jsonl, b.jsonl, three tasks, sequence.yaml."""
    folder = tmp_path_factory.mktemp("desk")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes))
    base.save_pretrained(str(folder / "base"))
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(str(folder / "base"))
    g = torch.Generator().manual_seed(1)
    for name in ("a", "b"):
        fresh = BertModel.from_pretrained(str(folder / "base"), local_files_only=True)
        fresh.name_or_path = "base"
        model = peft.get_peft_model(fresh, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]))
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.2, generator=g)
        model.save_pretrained(str(folder / "loras" / name), save_embedding_layers=False)
        picks = torch.randint(2, len(WORDS), (40, 8), generator=g).tolist()
        rows = [json.dumps({"text": " ".join(WORDS[i] for i in row)}) for row in picks]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    for name, classes in {"mood": ("happy", "sad"), "pace": ("fast", "slow"), "pets": ("cat", "dog")}.items():
        for split, count in (("train", 48), ("test", 16)):
            write_task(folder / f"{name}.{split}.jsonl", classes, count, g)
    (sequence,) = blocks("yaml")
    (folder / "sequence.yaml").write_text(sequence)
    return folder


def write_task(path: Path, classes: tuple[str, str], count: int, g: torch.Generator) -> None:
    """Rows of which one word tells the class."""
    picks = torch.randint(2, len(WORDS), (count, 5), generator=g).tolist()
    labels = [classes[i % 2] for i in range(count)]
    rows = [
        {"text": " ".join([label, *(WORDS[i] for i in row)]), "label": label}
        for label, row in zip(labels, picks, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("line", [row for block in blocks("sh") for row in block.strip().splitlines()])
def test_commands_run(line: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    program, *arguments = shlex.split(line)
    assert program == "loraforge"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    if "--out" in arguments:
        out = desk / arguments[arguments.index("--out") + 1]
        assert out.is_file() or list(out.glob("*.safetensors")) or list(out.glob("*s.json"))


def test_python_example_runs(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert (desk / "merged-python" / "adapter_config.json").is_file()


def method_table() -> list[str]:
    """README's table of methods, from the rows of the program."""
    lines = ["| method | idea | needs | models | output rank | cost a module | paper |", "|---" * 7 + "|"]
    for row in METHODS.values():
        paper = re.sub(r"arXiv (\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", row.paper)
        needs = "base, calibration" if row.needs == "calibration" else row.needs
        models = "yes" if row.checkpoints else ""
        lines.append(f"| `{row.name}` | {row.title} | {needs} | {models} | {row.output} | {row.cost} | {paper} |")
    return lines


def test_method_table_is_the_programs() -> None:
    shown = [line for line in README.splitlines() if re.match(r"\| (method|`[a-z-]+`) \|", line)]
    assert shown == [line for line in method_table() if not line.startswith("|---")]


@pytest.mark.parametrize(
    ("marker", "name"),
    [("emotion-table", "emotion"), ("data-free-table", "emotion-data-free")],
    ids=["emotion", "data_free"],
)
def test_emotion_tables_are_the_stored_ones(marker: str, name: str) -> None:
    stored_at = ROOT / "benchmarks" / "results" / f"{name}.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "real" / "emotion.py"), "--table", "--out", str(stored_at)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    stored = [row for row in printed.splitlines() if row.startswith("|")]
    shown = [row for row in between(marker).splitlines() if row.startswith("|")]
    assert len(stored) > 10
    assert shown == stored


def test_tables_of_the_six_tasks_are_the_stored_ones() -> None:
    """Here and in the benchmark's own README, which has all of them."""
    command = [sys.executable, str(ROOT / "benchmarks" / "real" / "tasks.py"), "--table"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    whole = (ROOT / "benchmarks" / "real" / "README.md").read_text(encoding="utf-8")
    for part in ("six", "counts", "ablation", "sequence"):
        marks = rf"<!-- tasks-table-{part}:begin -->\n(.*?)<!-- tasks-table-{part}:end -->"
        stored, detailed = (re.search(marks, text, re.DOTALL).group(1).strip() for text in (printed, whole))  # type: ignore[union-attr]
        assert detailed == stored and len(stored.splitlines()) > 5, part
        if part in ("six", "sequence"):
            assert between(f"tasks-table-{part}") == stored, part


def test_tables_of_the_heads_are_the_stored_ones() -> None:
    """Here and in the benchmark's own README, which has all of them."""
    command = [sys.executable, str(ROOT / "benchmarks" / "real" / "heads.py"), "--table"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    whole = (ROOT / "benchmarks" / "real" / "README.md").read_text(encoding="utf-8")
    for part in ("within", "between", "probe"):
        marks = rf"<!-- heads-table-{part}:begin -->\n(.*?)<!-- heads-table-{part}:end -->"
        stored, detailed = (re.search(marks, text, re.DOTALL).group(1).strip() for text in (printed, whole))  # type: ignore[union-attr]
        assert detailed == stored and len(stored.splitlines()) > 5, part
        if part == "between":
            assert between("heads-table-between") == stored


@pytest.mark.parametrize("name", ["iteris-against-loop", "merge-factored", "merge-at-size", "entrywise-at-size"])
def test_speed_figures_are_the_stored_ones(name: str) -> None:
    """Every figure of the speed section that names a results file is in it, rounded as shown."""
    stored = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    shown = [row for row in between("speed-table").splitlines() if f"({name})" in row]
    assert shown, name
    for row in shown:
        path, figure = re.search(r"<!-- ([^ ]+) -->\s*\|?\s*\**([0-9.]+)", row).groups()  # type: ignore[union-attr]
        value = stored
        for key in path.split("/"):
            value = value[key.replace("~", " ")]
        digits = len(figure.partition(".")[2])
        assert float(figure) == pytest.approx(round(float(value), digits), abs=10**-digits), row


def bench_text(stored: dict[str, object]) -> list[str]:
    """What `loraforge bench` prints of a result."""
    from loraforge.cli._output import Output
    from loraforge.cli.bench import print_result

    page = io.StringIO()
    with contextlib.redirect_stdout(page):
        print_result(Output(as_json=False, quiet=False, verbose=0), stored)
    return page.getvalue().strip().splitlines()


def test_bench_output_is_the_stored_one() -> None:
    stored = json.loads((ROOT / "benchmarks" / "results" / "bench.json").read_text(encoding="utf-8"))
    assert not stored["failures"]
    shown = between("bench-output").strip("`\n").splitlines()
    assert shown == bench_text(stored)


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target

"""The launch scripts: what they start on one node, on several and under Slurm, and what each model would take."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pretrain.__main__ import main
from pretrain.flags import parse
from tests.pretrain.support import metrics, tree
from tests.pretrain.test_data import write_corpus
from tests.slow import sweep
from tests.tokenizer.samples import write_sentencepiece

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = {  # and the nodes they are written for
    "llama/7b.sh": 1, "llama/13b.sh": 2, "llama/30b.sh": 4, "llama/65b.sh": 16, "llama2/7b.sh": 1, "llama2/70b.sh": 16,
    "llama3/8b.sh": 2, "llama3/70b.sh": 16, "bloom/176b.sh": 48, "opt/30b_24gpu.sh": 3, "opt/66b_24gpu.sh": 3,
}  # fmt: skip
BY_DEFAULT = {"llama/7b.sh", "opt/66b_24gpu.sh"}
OURS = re.compile(r"NNODES|NODE_RANK|MASTER_\w+|GPUS_PER_NODE|DATA_PATH|TOKENIZER_MODEL|OUTPUT|SAVE_INTERVAL|SLURM_\w+")
RUN = {"DATA_PATH": "0.3 a 0.7 b", "TOKENIZER_MODEL": "t.model", "OUTPUT": "run"}
NODES = RUN | {"NODE_RANK": "2", "MASTER_ADDR": "node0"}


def start(folder: Path, *words: str | Path, path: str = "", python: str | Path = sys.executable, **variables: str):
    """A program, started in `folder` with these variables alone of those that scripts know."""
    environment = {name: value for name, value in os.environ.items() if not OURS.fullmatch(name)}
    environment |= {"MEGATRON_ZH_PYTHON": str(python), "OMP_NUM_THREADS": "1"} | variables
    environment["PATH"] = path + environment["PATH"]
    return subprocess.run([*words], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stands in for Python: a program that only adds its arguments to a file beside it (and notes a variable)."""
    program = tmp_path_factory.mktemp("bin") / "python"
    note = f"import json, os, sys; open({str(program) + '.jsonl'!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')"
    note += f"; open({str(program) + '.connections'!r}, 'w').write(os.getenv('CUDA_DEVICE_MAX_CONNECTIONS', ''))"
    program.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" -c "{note}" "$@"\n')
    program.chmod(0o755)
    return program


def recorded(recorder: Path) -> list[list[str]]:
    return [json.loads(line) for line in Path(f"{recorder}.jsonl").read_text(encoding="utf-8").splitlines()]


def command(folder: Path, recorder: Path, script: str, *flags: str, **variables: str) -> list[str]:
    """What a script, which must succeed, has Python do."""
    done = start(folder, "bash", EXAMPLES / script, *flags, python=recorder, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    (words,) = recorded(recorder)
    return words


def connections(recorder: Path) -> str:
    """CUDA_DEVICE_MAX_CONNECTIONS as Python saw it last; "": not set."""
    return Path(f"{recorder}.connections").read_text(encoding="utf-8")


def test_every_script_is_tested() -> None:
    found = {str(file.relative_to(EXAMPLES)) for file in EXAMPLES.rglob("*.sh") if "/../model.sh" in file.read_text()}
    assert found == set(SCRIPTS)


@pytest.mark.parametrize("script", sweep(SCRIPTS, BY_DEFAULT))
def test_a_model_fits_the_cluster_that_its_script_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recorder: Path, script: str
) -> None:
    """--dry-run without any variable: it is done here what the script would start; all of them have 80 GB a GPU."""
    ranks = SCRIPTS[script] * 8
    interpreter, module, *flags = command(tmp_path, recorder, script, "--dry-run")
    assert (interpreter, module) == ("-m", "pretrain")
    assert flags[:2] == ["--world-size", str(ranks)]
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"dry run of {ranks} ranks")
    assert printed[1].endswith("compute in bfloat16")
    assert any("states as predicted to the byte" in line for line in printed)
    totals = [float(line.split()[-1]) for line in printed if re.match(r" +\d+ +\d+  ", line)]
    assert len(totals) == parse(flags).engine.parallel.pipeline_model_parallel_size
    assert 10 < max(totals) < 75
    header = (EXAMPLES / script).read_text()
    assert ("one node of 8" if ranks == 8 else f"{ranks // 8} nodes of 8") in header
    assert tree(tmp_path) == {}


@pytest.mark.slow
def test_a_dry_run_as_a_user_starts_it(tmp_path: Path) -> None:
    """Flags come last and win, variables say what the cluster is, and what is given is checked."""
    variables = {"NNODES": "2", "GPUS_PER_NODE": "4", "PP": "1", "ZERO_STAGE": "3", "OUTPUT": "run"}
    done = start(tmp_path, "bash", EXAMPLES / "llama/7b.sh", "--dry-run", "--num-layers", "3", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert "DP 8 x TP 1 | ZeRO-3" in done.stdout
    assert "embedding, 0-2, head" in done.stdout
    done = start(tmp_path, "bash", EXAMPLES / "llama/7b.sh", "--dry-run", DATA_PATH="absent")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --data-path absent: absent.idx does not exist")
    assert tree(tmp_path) == {}


def test_one_node(tmp_path: Path, recorder: Path) -> None:
    words = command(tmp_path, recorder, "llama/7b.sh", **RUN)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8", "-m", "pretrain"]
    assert words[: len(launcher)] == launcher


@pytest.mark.parametrize("port", [{}, {"MASTER_PORT": "1234"}])
def test_several_nodes(tmp_path: Path, recorder: Path, port: dict[str, str]) -> None:
    words = command(tmp_path, recorder, "opt/66b_24gpu.sh", "--zero-stage", "2", "--seed", "7", **NODES, **port)
    launcher = ["-m", "torch.distributed.run", "--nnodes", "3", "--node-rank", "2", "--master-addr", "node0"]
    launcher += ["--master-port", port.get("MASTER_PORT", "29500"), "--nproc-per-node", "8", "-m", "pretrain"]
    assert words[: len(launcher)] == launcher
    config = parse(words[len(launcher) :])
    config.engine.validate(24)
    assert connections(recorder) == "1"  # of tensor parallelism
    assert config.data.data_path == ("0.3", "a", "0.7", "b")
    assert config.data.tokenizer_model == "t.model"
    assert (config.checkpoint.save, config.checkpoint.load, config.checkpoint.save_interval) == ("run", "run", 500)
    assert config.logging.metrics == "run.jsonl"
    assert config.engine.parallel.sequence_parallel
    assert config.engine.precision.bf16
    assert config.engine.pipeline.pipeline_layers == (10, 11, 11, 11, 11, 10)
    assert config.engine.recompute.recompute_granularity is None
    assert (config.engine.zero.zero_stage, config.training.seed) == (2, 7)
    assert config.engine.model.vocab_size == 50272


def test_the_layout_is_in_variables(tmp_path: Path, recorder: Path) -> None:
    layout = {"TP": "1", "PP": "2", "MICRO_BATCH_SIZE": "4", "ZERO_STAGE": "0", "RECOMPUTE": "full", "LAYERS": "40,24"}
    words = command(tmp_path, recorder, "opt/66b_24gpu.sh", "--dry-run", NNODES="5", **layout, SAVE_INTERVAL="9", **RUN)
    config = parse(words[2:])
    assert connections(recorder) == ""
    assert config.engine.parallel.tensor_model_parallel_size == 1
    assert config.engine.parallel.pipeline_model_parallel_size == 2
    assert not config.engine.parallel.sequence_parallel
    assert config.engine.batch.micro_batch_size == 4
    assert config.engine.zero.zero_stage == 0
    assert config.engine.recompute.recompute_granularity == "full"
    assert config.engine.pipeline.pipeline_layers == (40, 24)
    assert config.checkpoint.save_interval == 9
    assert config.dry.ranks == 40


@pytest.mark.parametrize(
    "script, variables, message",
    [
        ("llama/7b.sh", {}, "DATA_PATH is not set: give corpora written by python -m tools.preprocess_data"),
        ("llama/7b.sh", RUN | {"DATA_PATH": ""}, "DATA_PATH is not set: give corpora"),
        ("llama/7b.sh", RUN | {"TOKENIZER_MODEL": ""}, "TOKENIZER_MODEL is not set: give the tokenizer"),
        ("llama/7b.sh", RUN | {"OUTPUT": ""}, "OUTPUT is not set: give a folder for checkpoints"),
        ("llama/13b.sh", RUN, "NODE_RANK is not set: give the number of this node, from 0"),
        ("llama/13b.sh", RUN | {"NODE_RANK": "0"}, "MASTER_ADDR is not set: give the address of node 0"),
        ("llama/13b.sh", NODES, "NODE_RANK 2: must be from 0 to 1"),
        ("llama/7b.sh", RUN | {"NODE_RANK": "one"}, "NODE_RANK one: must be from 0 to 0"),
        ("llama/7b.sh", RUN | {"NNODES": "two"}, "NNODES two: must be a whole number above 0"),
        ("llama/7b.sh", RUN | {"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE 0: must be a whole number above 0"),
        ("llama/7b.sh", RUN | {"TP": "-1"}, "TP -1: must be a whole number above 0"),
        ("llama/7b.sh", RUN | {"SAVE_INTERVAL": "1h"}, "SAVE_INTERVAL 1h: must be a whole number above 0"),
        ("llama/7b.sh", RUN | {"ZERO_STAGE": "4"}, "ZERO_STAGE 4: must be one of 0 1 2 3"),
        ("llama/7b.sh", RUN | {"RECOMPUTE": "all"}, "RECOMPUTE all: must be one of none selective full"),
    ],
)
def test_a_wrong_request_is_one_line(
    tmp_path: Path, recorder: Path, script: str, variables: dict[str, str], message: str
) -> None:
    done = start(tmp_path, "bash", EXAMPLES / script, python=recorder, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert tree(tmp_path) == {}
    assert not Path(f"{recorder}.jsonl").exists()


@pytest.mark.slow
def test_a_run_goes_on_when_it_is_started_again(tmp_path: Path) -> None:
    """The 7B script with a smaller model, for real: two processes, stopped after a step, and started again."""
    write_corpus(tmp_path / "corpus")
    write_sentencepiece(tmp_path / "t.model", (ROOT / "README.md").read_text("utf-8").splitlines(), 400)
    variables = {"DATA_PATH": "corpus", "TOKENIZER_MODEL": "t.model", "OUTPUT": "run", "GPUS_PER_NODE": "2"}
    shape = "--num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --vocab-size 1000"
    small = f"{shape} --seq-length 16 --global-batch-size 8 --train-iters 2 --lr-warmup-iters 1 --no-bf16".split()
    for flags in (["--exit-interval", "1"], []):
        done = start(tmp_path, "bash", EXAMPLES / "llama/7b.sh", *small, *flags, **variables)
        assert done.returncode == 0, done.stderr
    assert "continuing from iteration 1 of run" in done.stdout
    assert [record["iteration"] for record in metrics(tmp_path / "run.jsonl")] == [1, 2]


FAKE_SLURM = {
    "scontrol": '[[ "$*" == "show hostnames gpu[07-09]" ]] && printf "gpu07\\ngpu08\\ngpu09\\n"',
    "srun": """while [[ $1 == --* ]]; do shift; done
for node in 2 0 1; do SLURM_NODEID=$node "$@"; done""",
}


def slurm(folder: Path, recorder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A Slurm job of three nodes of four GPUs, submitted in `folder`."""
    for name, content in FAKE_SLURM.items():
        program = recorder.parent / name
        program.write_text(f"#!/usr/bin/env bash\n{content}\n")
        program.chmod(0o755)
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "gpu[07-09]", "SLURM_JOB_NUM_NODES": "3"}
    job |= {"SLURM_GPUS_ON_NODE": "4"} | variables
    copy = recorder.parent / "slurm_script"  # Slurm runs a copy that lies elsewhere
    shutil.copy(EXAMPLES / "slurm/pretrain.sbatch", copy)
    return start(folder, "bash", copy, *words, path=f"{recorder.parent}:", python=recorder, **job)


def test_slurm_starts_torchrun_once_on_every_node(recorder: Path) -> None:
    done = slurm(ROOT, recorder, "examples/opt/66b_24gpu.sh", "--seed", "7", **RUN)
    assert (done.returncode, done.stderr) == (0, "")
    started = recorded(recorder)
    assert [words[5] for words in started] == ["2", "0", "1"]
    for words in started:
        assert words[:5] == ["-m", "torch.distributed.run", "--nnodes", "3", "--node-rank"]
        rendezvous = ["--master-addr", "gpu07", "--master-port", "23456", "--nproc-per-node", "4", "-m", "pretrain"]
        assert words[6:14] == rendezvous
        assert words[-2:] == ["--seed", "7"]


@pytest.mark.parametrize(
    "words, variables, message",
    [
        ([], {}, "no launch script: sbatch --nodes N examples/slurm/pretrain.sbatch examples/llama/7b.sh"),
        (["examples/none.sh"], {}, "examples/none.sh: no such launch script"),
        (["examples/llama/7b.sh"], {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is not set: submit this script with sbatch"),
    ],
)
def test_slurm_refuses(recorder: Path, words: list[str], variables: dict[str, str], message: str) -> None:
    done = slurm(ROOT, recorder, *words, **variables)
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


def test_slurm_elsewhere_than_in_the_repository(tmp_path: Path, recorder: Path) -> None:
    done = slurm(tmp_path, recorder, "7b.sh")
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {tmp_path} is not the repository: submit this script from there\n",
    )


def test_shell_syntax() -> None:
    scripts = [file for file in EXAMPLES.rglob("*") if file.suffix in (".sh", ".sbatch")]
    assert len(scripts) > len(SCRIPTS)
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        options = ["--shell=bash", "--severity=warning", "--external-sources", "--source-path=SCRIPTDIR"]
        subprocess.run(["shellcheck", *options, "--exclude=SC2054", *scripts], check=True)


@pytest.mark.parametrize("page", sweep(["docs/launching.md", "docs/zh/launching.md"], {"docs/zh/launching.md"}))
def test_the_documentation_shows_what_is_printed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, recorder: Path, page: str
) -> None:
    text = (ROOT / page).read_text("utf-8")
    assert main(command(tmp_path, recorder, "opt/66b_24gpu.sh", "--dry-run")[2:]) == 0
    printed = capsys.readouterr().out
    assert f"$ bash examples/opt/66b_24gpu.sh --dry-run\n{textwrap.indent(printed, '    ')}" in text
    flags = re.search(r"\$ python -m pretrain (.*?)\n    error", text, re.DOTALL)
    assert flags is not None
    assert main(flags[1].replace("\\\n", "").split()) == 2
    assert textwrap.indent(capsys.readouterr().err, "    ") in text
    assert all(f"`{name}`" in text for name in (*RUN, *NODES, "RECOMPUTE", "MASTER_PORT", "SAVE_INTERVAL"))
    for script in SCRIPTS:
        assert f"`{Path(script).name}`" in text or f"`examples/{script}`" in text

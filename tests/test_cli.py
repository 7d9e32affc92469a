"""The command line: exit codes, one clear line on bad input, one JSON document on request, stop and resume."""

import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from importlib.resources import files

import pytest
import torch
from safetensors.torch import load_file

from vitrim.cli.app import app, run
from vitrim.errors import VitrimError
from vitrim.methods import METHODS

ASSET = files("vitrim") / "assets" / "digits-vit"
DIGITS = f"local-dir:{ASSET}"
RECIPE = """
calibrate: {num_images: 64, batch_size: 32}
repair: {refit: false}
recover: {steps: 400, batch_size: 8, lr: 1.0e-5, num_validations: 8}
"""


def test_inspect_prints_a_table_or_one_json_document(capsys):
    assert run(["inspect", DIGITS]) == 0
    assert "683,242 parameters" in capsys.readouterr().out
    assert run(["inspect", DIGITS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["sites"]) == 6
    (row,) = [row for row in found["predicted"] if row.get("mlp_ratio") == 1.0]
    assert row["parameters"] == 349738 and set(row["hidden_dims"].values()) == {96}


def test_inspect_predicts_the_one_budget_that_is_asked_for(capsys):
    assert run(["inspect", DIGITS, "--hidden-dim", "50", "--exact"]) == 0
    shown = capsys.readouterr().out
    assert "hidden_dim 50" in shown and "mlp_ratio" not in shown
    assert run(["inspect", DIGITS, "--mlp-ratio", "1", "--hidden-dim", "50"]) == 2
    assert "give exactly one of params_ratio" in capsys.readouterr().err


def test_methods_lists_every_method_with_its_paper(capsys):
    assert run(["methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == METHODS.keys() and rows["dgmr"]["arxiv"] == "2506.08591"
    assert run(["methods"]) == 0


def test_compress_and_evaluate(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    command = ["compress", DIGITS, "--data", "digits", "--out", str(tmp_path / "out"), "--recipe", str(recipe)]
    assert run([*command, "--recover-steps", "2", "--mlp-ratio", "0.5", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["widths"]["blocks.0.mlp"] == [384, 48] and printed["recovery"]["num_steps"] == 2
    assert run(["evaluate", str(tmp_path / "out"), "--against", DIGITS, "--data", "digits", "--limit", "40"]) == 0
    assert "cosine CLS" in capsys.readouterr().out


def test_no_repair_and_select_on(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("calibrate: {num_images: 32}")
    command = ["compress", DIGITS, "--data", "digits", "--recipe", str(tmp_path / "recipe.yaml"), "--quiet"]
    command += ["--out", str(tmp_path / "out"), "--no-repair"]
    assert run([*command, "--select-on", "weights", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cut_errors"] == {}


def test_every_command_has_an_example_that_parses(capsys):
    commands = [name for name in app if not name.startswith("-")]
    assert len(commands) > 10
    for name in commands:
        lines = inspect.getdoc(app[name].default_command).split("\n\n")
        (example,) = [line.removeprefix("Example: ") for line in lines if line.startswith("Example: ")]
        words = shlex.split(example.replace("\n", " "))
        assert words[:2] == ["vitrim", name]
        app.parse_args(words[1:], exit_on_error=False, print_error=False)
    assert run(["--help"]) == 0
    assert "Exit codes: 0 done, 1 below a limit of --fail-under, 2 wrong input" in " ".join(
        capsys.readouterr().out.split()
    )


def test_options_of_the_command_line_reach_the_recipe(tmp_path, monkeypatch, capsys):
    seen = []

    def stop_there(model, *, recipe, **_):
        seen.append(recipe)
        raise VitrimError("that is all")

    monkeypatch.setattr("vitrim.compression.pipeline.compress", stop_there)
    given = (
        "--method low-rank --option rank=0.5 --option solver=svd --blockwise block --at-once-steps 9 --recover-steps 8"
    )
    given += " --gradient-accumulation-steps 2 --precision bf16 --checkpoint-activations"
    given += " --save-every 3 --epoch-images 64"
    command = ["compress", DIGITS, "--out", str(tmp_path / "out"), *given.split()]
    assert run(command) == 2 and "that is all" in capsys.readouterr().err
    (recipe,) = seen
    (step,) = recipe.steps
    assert step.method == "low-rank" and step.options == {"rank": 0.5, "solver": "svd"}
    assert recipe.blockwise.train == "block" and recipe.at_once.steps == 9
    wanted = {
        "steps": 8,
        "gradient_accumulation_steps": 2,
        "precision": "bf16",
        "checkpoint_activations": True,
        "save_every": 3,
        "epoch_images": 64,
    }
    assert wanted.items() <= recipe.recover.model_dump().items()


@pytest.mark.parametrize("option", ["sparsity", "=3", "rank=[1,"])
def test_an_option_of_a_method_is_a_key_and_a_value(tmp_path, capsys, option):
    assert run(["compress", DIGITS, "--out", str(tmp_path / "out"), "--option", option]) == 2
    assert f"--option {option!r}: give KEY=VALUE" in capsys.readouterr().err


def test_of_several_processes_each_says_which_one_failed(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(["inspect", "nowhere/at/all"]) == 2
    assert capsys.readouterr().err.startswith("vitrim [1]: ")


@pytest.fixture
def bad_inputs(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "corrupt" / "a.jpg").write_bytes(b"no image")
    (tmp_path / "recipe.yaml").write_text("model: x\ndistil: {steps: 3}\n")
    (tmp_path / "existing").mkdir()
    (tmp_path / "file").write_text("")
    return tmp_path


BAD = {
    "unknown model": (["compress", "timm/no_such_vit", "--out", "{0}/out"], "timm/no_such_vit"),
    "unknown method": (["compress", DIGITS, "--out", "{0}/out", "--method", "dgrm"], "did you mean 'dgmr'"),
    "missing data": (["compress", DIGITS, "--data", "{0}/none", "--out", "{0}/out"], "none"),
    "empty data": (["compress", DIGITS, "--data", "{0}/empty", "--out", "{0}/out"], "no images"),
    "corrupt data": (["compress", DIGITS, "--data", "{0}/corrupt", "--out", "{0}/out"], "could be read"),
    "width 0": (["compress", DIGITS, "--hidden-dim", "0", "--out", "{0}/out"], "greater than or equal to 1"),
    "width above": (["compress", DIGITS, "--hidden-dim", "385", "--out", "{0}/out"], "use 1..384"),
    "ratio 0": (["compress", DIGITS, "--mlp-ratio", "0", "--out", "{0}/out"], "greater than 0"),
    "recipe key": (["compress", "--recipe", "{0}/recipe.yaml", "--out", "{0}/out"], "unknown key 'distil'"),
    "no recipe": (["compress", "--recipe", "{0}/none.yaml", "--out", "{0}/out"], "none.yaml"),
    "no model": (["compress", "--out", "{0}/out"], "model"),
    "unwritable": (["compress", DIGITS, "--out", "{0}/file/out"], "can't be written"),
    "existing": (["compress", DIGITS, "--out", "{0}/existing"], "exists already"),
    "unknown option": (["compress", DIGITS, "--out", "{0}/out", "--wdith", "3"], "wdith"),
    "unknown command": (["shrink"], "shrink"),
    "no number": (["compress", DIGITS, "--out", "{0}/out", "--hidden-dim", "wide"], "wide"),
    "evaluate": (["evaluate", "{0}/empty", "--against", DIGITS, "--data", "digits"], "config.json"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_exit_code_2_and_nothing_left_behind(bad_inputs, capsys, name):
    arguments, words = BAD[name]
    before = sorted(path.name for path in bad_inputs.rglob("*"))
    assert run([argument.format(bad_inputs) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and words in printed.err
    assert sorted(path.name for path in bad_inputs.rglob("*")) == before


def test_ctrl_c_between_two_states_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    def stop(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("vitrim.compression.pipeline.compress", stop)
    assert run(["compress", DIGITS, "--out", str(tmp_path / "out")]) == 130
    assert "--resume" in capsys.readouterr().err


@pytest.mark.defaults
def test_ctrl_c_leaves_a_state_from_which_the_same_result_comes(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    given = [
        "compress",
        DIGITS,
        "--data",
        "digits",
        "--recipe",
        str(tmp_path / "recipe.yaml"),
        "--recover-steps",
        "16",
        "--quiet",
    ]
    out, state = tmp_path / "out", tmp_path / ".out.partial" / "recover.state"
    command = [sys.executable, "-c", "from vitrim.cli import main; main()", *given, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    stopped = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not state.exists() and stopped.poll() is None:
        time.sleep(0.02)
    stopped.send_signal(signal.SIGINT)
    _, errors = stopped.communicate()
    assert stopped.returncode == 130 and "--resume" in errors and not out.exists()
    assert run([*given, "--out", str(out), "--resume"]) == 0
    assert run([*given, "--out", str(tmp_path / "whole")]) == 0
    first, second = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml", "whole"]

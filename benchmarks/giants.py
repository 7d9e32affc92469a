"""What cutting every MLP to the model width takes off the giants: parameters and multiply-accumulates at 224 px.

Nothing is downloaded and no weight exists: every model is built, cut and counted on the meta device. The counts stand
beside the figures of the DGMR paper (arXiv 2506.08591), with every disagreement in words; MACs are held to a closed
form. How well a cut model sees is not measured here.

    python benchmarks/giants.py              # about three minutes on one core, under 1 GiB
    python benchmarks/giants.py --model "EVA-CLIP-E"
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitrim.cost.count import count_macs, num_parameters
from vitrim.models.sites import find_mlps
from vitrim.output.provenance import environment
from vitrim.surgery import KeepUnits, reshape_

SIZE = 224
RATIOS = (2, 1)  # in falling order: each cut starts from the one before it
TOLERANCE = 0.001  # of the closed form; attention is 0.9% or more of every model, so that missing it is noticed
ABSTRACT = 57.0  # percent of parameters and of FLOPs, "more than", without naming models
ABSTRACT_EVA_E = 71.5  # percent of parameters and of FLOPs

# A process's peak memory counts the memory that its parent had when it was forked; so a small one stands in between.
MEASURE = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True, check=True)
seconds = time.perf_counter() - start
unit = 2**20 if sys.platform == "darwin" else 2**10
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit
print(json.dumps({"seconds": seconds, "peak_mib": peak, "output": done.stdout}))
"""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """What the papers print: parameters as written in the overview of DGMR, times smaller at r = 1, AMP's FLOPs."""

    billions: str
    times_smaller: float | None = None
    tera_flops: float | None = None  # of the uncut model, from the table of AMP (arXiv 2603.08100), by the same group


@dataclass(frozen=True, kw_only=True)
class Giant:
    """A vision encoder, with what the closed form needs to know of it."""

    source: str
    width: int
    depth: int
    hidden: int
    patch: int = 14
    gated: bool = False
    num_prefix: int = 1
    attention_pool: bool = False
    paper: Paper | None = None


# timm builds all but the last three. InternViT-6B: config.json of OpenGVLab/InternViT-6B-224px on the Hugging Face hub
# (hidden_size 3200, intermediate_size 12800, 48 layers, 25 heads, qk_normalization, no qkv_bias; 45 layers in
# InternViT-6B-448px-V1-5), RMS norms over the whole width and no final norm: modeling_intern_vit.py of
# OpenGVLab/InternVL. EVA-CLIP-8B: EVA-CLIP-8B-prune.json of visresearch/DGMR, the paper's own code (width 4096,
# mlp_ratio 5, 32 layers, head_width 128, RMS norms before the blocks, no qkv_bias).
GIANTS = {
    "OpenCLIP-g": Giant(
        source="timm/vit_giant_patch14_clip_224",
        width=1408,
        depth=40,
        hidden=6144,
        paper=Paper(billions="1.01", times_smaller=2.1, tera_flops=0.52),
    ),
    "OpenCLIP-G": Giant(
        source="timm/vit_gigantic_patch14_clip_224",
        width=1664,
        depth=48,
        hidden=8192,
        paper=Paper(billions="1.84", times_smaller=2.3, tera_flops=0.95),
    ),
    "EVA-CLIP-E": Giant(
        source="timm/eva02_enormous_patch14_clip_224",
        width=1792,
        depth=64,
        hidden=15360,
        paper=Paper(billions="4.35", times_smaller=3.5, tera_flops=2.23),
    ),
    "DINOv2-g": Giant(
        source="timm/vit_giant_patch14_dinov2",
        width=1536,
        depth=40,
        hidden=4096,
        gated=True,
        paper=Paper(billions="1.13"),
    ),
    "DINOv3-7B": Giant(
        source="timm/vit_7b_patch16_dinov3", patch=16, width=4096, depth=40, hidden=8192, gated=True, num_prefix=5
    ),
    "DINOv3-H+": Giant(
        source="timm/vit_huge_plus_patch16_dinov3",
        patch=16,
        width=1280,
        depth=32,
        hidden=5120,
        gated=True,
        num_prefix=5,
    ),
    "SigLIP so400m": Giant(
        source="timm/vit_so400m_patch14_siglip_224",
        width=1152,
        depth=27,
        hidden=4304,
        num_prefix=0,
        attention_pool=True,
    ),
    "InternViT-300M": Giant(source="timm/vit_intern300m_patch14_448", width=1024, depth=24, hidden=4096),
    "InternViT-6B": Giant(
        source="internvit", width=3200, depth=48, hidden=12800, paper=Paper(billions="6.0", times_smaller=2.0)
    ),
    "InternViT-6B V1.5": Giant(source="internvit", width=3200, depth=45, hidden=12800),
    "EVA-CLIP-8B": Giant(
        source="eva-clip-8b",
        width=4096,
        depth=32,
        hidden=20480,
        paper=Paper(billions="7.5", times_smaller=2.3, tera_flops=3.86),
    ),
}


def main() -> None:
    """Count every giant, and time `vitrim inspect` on those that timm knows by name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=[*GIANTS, "all"], default="all")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/giants.json"))
    arguments = parser.parse_args()
    table = {}
    for name, giant in GIANTS.items():
        if arguments.model in (name, "all"):
            table[name] = {**measure(giant), "inspect": inspection_cost(giant)}
            print(f"{name}: {table[name]['parameters']}", flush=True)
    result = {
        "environment": {**environment(), "transformers": version("transformers"), "seed": "none: nothing is random"},
        "image_size": SIZE,
        "imports_alone": cost_of([sys.executable, "-c", "import torch, timm"]),
        "table": table,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


def build(giant: Giant) -> nn.Module:
    """The uncut encoder for images of 224 px on the meta device, without a class head or a projection to text.

    Its parameters are frozen: torch's counter can't follow the learned query of an attention pool otherwise.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        if giant.source.startswith("timm/"):
            import timm

            model = timm.create_model(giant.source.removeprefix("timm/"), img_size=SIZE, num_classes=0)
        else:
            model = _eva_clip_8b(giant) if giant.source == "eva-clip-8b" else _intern_vit(giant)
    return model.eval().requires_grad_(False).to("meta")


def _intern_vit(giant: Giant) -> nn.Module:
    from transformers import InternVLVisionConfig, InternVLVisionModel

    config = InternVLVisionConfig(
        hidden_size=giant.width,
        intermediate_size=giant.hidden,
        num_hidden_layers=giant.depth,
        num_attention_heads=25,
        attention_bias=False,
        use_qk_norm=True,
        norm_type="rms_norm",
        image_size=SIZE,
        patch_size=giant.patch,
    )
    return InternVLVisionModel(config)


def _eva_clip_8b(giant: Giant) -> nn.Module:
    from timm.layers import RmsNorm
    from timm.models.eva import Eva

    return Eva(
        img_size=SIZE,
        patch_size=giant.patch,
        embed_dim=giant.width,
        depth=giant.depth,
        num_heads=32,
        mlp_ratio=giant.hidden / giant.width,
        qkv_bias=False,
        use_rot_pos_emb=False,
        norm_layer=RmsNorm,
        global_pool="token",
        num_classes=0,
    )


def measure(giant: Giant) -> dict[str, Any]:
    """Parameters and MACs of one giant, uncut and with every hidden layer at 2 and 1 times the model width.

    Raises:
        ArithmeticError: the counted MACs are not those of the closed form.
    """
    model = build(giant)
    parameters, macs, products = {}, {}, {}
    for ratio in (None, *RATIOS):
        if ratio is not None:
            cut_to_(model, ratio)
        key = "uncut" if ratio is None else f"r{ratio}"
        parameters[key] = num_parameters(model)
        macs[key] = count_macs(model, torch.empty(1, 3, SIZE, SIZE, device="meta"))
        hidden = giant.hidden if ratio is None else min(giant.hidden, ratio * giant.width)
        expected, products[key] = closed_form_macs(giant, hidden)
        if abs(macs[key] - expected) > TOLERANCE * expected:
            raise ArithmeticError(f"{giant.source} {key}: {macs[key]} MACs counted, {expected} by the closed form.")
    return {
        "source": giant.source,
        "num_mlps": len(find_mlps(model)),
        "width": giant.width,
        "hidden": giant.hidden,
        "parameters": parameters,
        "macs": macs,
        "attention_product_macs": products["uncut"],
    }


def cut_to_(model: nn.Module, ratio: int) -> None:
    """Give every MLP `ratio` times its model width in hidden units, or what it has where that is less."""
    sites = find_mlps(model)
    reshape_(model, [KeepUnits(site=s, keep=tuple(range(min(ratio * s.d_model, s.d_hidden)))) for s in sites])


def closed_form_macs(giant: Giant, hidden: int) -> tuple[int, int]:
    """MACs of one image by hand: in all, and those of attention's two products (QK' and the weighted sum of V).

    Patch embedding; per block and token 4 D^2 for qkv and the projection, 2 or 3 D H for the MLP; per block 2 N^2 D for
    attention's products. An attention pool has one query, and an MLP for one token.
    """
    num_patches = (SIZE // giant.patch) ** 2
    num_tokens, width = num_patches + giant.num_prefix, giant.width
    mlp = (3 if giant.gated else 2) * width * hidden
    products = 2 * num_tokens**2 * width * giant.depth
    total = 3 * giant.patch**2 * num_patches * width + giant.depth * num_tokens * (4 * width**2 + mlp)
    if giant.attention_pool:
        products += 2 * num_tokens * width
        total += 2 * width**2 + 2 * num_tokens * width**2 + mlp
    return total + products, products


def inspection_cost(giant: Giant) -> dict[str, float] | None:
    """What `vitrim inspect` costs in a process of its own; None without a name to inspect."""
    if not giant.source.startswith("timm/"):
        return None
    return cost_of([sys.executable, "-c", "from vitrim.cli import main; main()", "inspect", giant.source, "--json"])


def cost_of(command: list[str]) -> dict[str, float]:
    """Seconds of the fastest of three runs, and the highest peak of resident memory in MiB."""
    runs = [run_measured(command) for _ in range(3)]
    return {"seconds": min(run["seconds"] for run in runs), "peak_mib": max(run["peak_mib"] for run in runs)}


def run_measured(command: list[str]) -> dict[str, Any]:
    """Run a command: seconds, peak resident memory in MiB, what it wrote to standard output."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def markdown(result: dict[str, Any]) -> str:
    """All that the documentation shows."""
    return "\n\n".join(part(result) for part in (parameters_table, imports_line, macs_table, disagreements))


def imports_line(result: dict[str, Any]) -> str:
    """What a process costs that only imports the libraries."""
    alone = result["imports_alone"]
    return f"`import torch, timm` alone: {alone['seconds']:.1f} s, {alone['peak_mib']:.0f} MiB."


def parameters_table(result: dict[str, Any]) -> str:
    """Parameters before and after, the paper's figures, and the cost of `vitrim inspect`."""
    head = ("model", "MLPs", "hidden / width", "parameters", "r = 2", "r = 1", "times smaller", "paper", "inspect")
    rows = []
    for name, row in result["table"].items():
        parameters, paper, inspect = row["parameters"], GIANTS[name].paper, row["inspect"]
        rows.append(
            (
                name,
                row["num_mlps"],
                f"{row['hidden']} / {row['width']}",
                f"{parameters['uncut'] / 1e9:.3f}B",
                *(_after(parameters, key, 1e9, "B") for key in ("r2", "r1")),
                f"{parameters['uncut'] / parameters['r1']:.2f}",
                _paper_cell(paper),
                "-" if inspect is None else f"{inspect['seconds']:.1f} s, {inspect['peak_mib']:.0f} MiB",
            )
        )
    return _table(head, rows)


def macs_table(result: dict[str, Any]) -> str:
    """MACs before and after, and FLOPs (two a MAC), both also without attention's products, beside AMP's."""
    head = ("model", "MACs", "r = 2", "r = 1", "r = 1, linear only", "FLOPs", "FLOPs, linear only", "AMP's FLOPs")
    rows = []
    for name, row in result["table"].items():
        macs, flops = row["macs"], GIANTS[name].paper and GIANTS[name].paper.tera_flops
        linear = linear_macs(row)
        rows.append(
            (
                name,
                f"{macs['uncut'] / 1e9:.1f}G",
                *(_after(macs, key, 1e9, "G", digits=1) for key in ("r2", "r1")),
                _after(linear, "r1", 1e9, "G", digits=1),
                f"{2 * macs['uncut'] / 1e12:.2f}T",
                f"{2 * linear['uncut'] / 1e12:.2f}T",
                "-" if flops is None else f"{flops:.2f}T",
            )
        )
    return _table(head, rows)


def disagreements(result: dict[str, Any]) -> str:
    """Every figure of the papers that these counts do not bear out, one in a line."""
    lines = [line for name, row in result["table"].items() for line in _disagreements_of(name, row)]
    return "\n".join(f"- {line}" for line in lines)


def _disagreements_of(name: str, row: dict[str, Any]) -> Iterator[str]:
    paper, uncut = GIANTS[name].paper, row["parameters"]["uncut"]
    if paper is None:
        return
    if f"{uncut / 1e9:.{len(paper.billions.partition('.')[2])}f}" != paper.billions:
        yield f"**{name}**: {uncut / 1e9:.2f}B parameters; the paper writes {paper.billions}B."
    smaller = uncut / row["parameters"]["r1"]
    if paper.times_smaller is not None and round(smaller, 1) != paper.times_smaller:
        yield f"**{name}**: {smaller:.2f} times smaller at r = 1; the paper writes {paper.times_smaller}."
    fewer = {"parameters": _percent(row["parameters"], "r1"), "MACs": _percent(row["macs"], "r1")}
    claim, said = (ABSTRACT_EVA_E, "") if name == "EVA-CLIP-E" else (ABSTRACT, "more than ")
    off = {key: x for key, x in fewer.items() if (x <= claim if said else round(x, 1) != claim)}
    if off:
        ours = " and ".join(f"{x:.1f}% fewer {key}" for key, x in off.items())
        yield f"**{name}**: {ours} at r = 1; the abstract says {said}{claim:.1f}% of parameters and of FLOPs."
    if paper.tera_flops is not None and round(2 * row["macs"]["uncut"] / 1e12, 2) != paper.tera_flops:
        flops, linear = 2 * row["macs"]["uncut"] / 1e12, 2 * linear_macs(row)["uncut"] / 1e12
        yield (
            f"**{name}**: {flops:.2f}T FLOPs uncut, {linear:.2f}T of them in linear layers; "
            f"AMP writes {paper.tera_flops:.2f}T."
        )


def linear_macs(row: dict[str, Any]) -> dict[str, int]:
    """MACs of linear layers and the patch embedding: all but attention's two products."""
    return {key: macs - row["attention_product_macs"] for key, macs in row["macs"].items()}


def _percent(counts: dict[str, int], key: str) -> float:
    return 100 * (1 - counts[key] / counts["uncut"])


def _after(counts: dict[str, int], key: str, unit: float, symbol: str, *, digits: int = 3) -> str:
    if counts[key] == counts["uncut"]:
        return "unchanged"
    return f"{counts[key] / unit:.{digits}f}{symbol} (-{_percent(counts, key):.1f}%)"


def _paper_cell(paper: Paper | None) -> str:
    if paper is None:
        return "-"
    return f"{paper.billions}B" if paper.times_smaller is None else f"{paper.billions}B, {paper.times_smaller}x smaller"


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


if __name__ == "__main__":
    main()

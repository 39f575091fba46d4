"""Write the small weights that travel with the repository: pocket/stage_{a,b,c}.safetensors.

    python -m pocket.ship [--weights runs/pocket] [--out pocket]      the last line of `make pocket`

Matrices become float16, vectors (norms, biases, statistics) stay float32, Stage B's file also has
the compressor, and B and C are their averaged weights. What a checkpoint knows about itself
(config, checksums of the stages it was trained on) and where it comes from are in the file's
metadata. Everything is measured again with the rounded weights, on drawings held out of training.
"""

import json
import os
import platform
from datetime import date
from pathlib import Path

import torch
from safetensors.torch import save_file
from torchvision.transforms.functional import to_tensor

import sample
import semantic_compressor
import stage_b
from plumbing import checkpoint, cli, pictures
from pocket import shapes


def rounded(tensors):
    """Matrices and convolutions as float16; what is rounded once is rounded for good."""
    return {name: value.half() if value.is_floating_point() and value.dim() >= 2 else value
            for name, value in tensors.items()}


def restored(tensors):
    """What a model holds after reading `rounded` tensors: their checksum is the stage's."""
    return {name: value.float() if value.is_floating_point() else value
            for name, value in tensors.items()}


def provenance(state):
    """How this stage was trained: its command, and those of the runs it began with."""
    if "provenance" in state:                                             # shipped before
        return state["provenance"]
    return dict(command=state["command"], before=state["before"],
                steps=state["step"], samples=state["samples"],
                data="of the command, else pocket/shapes.py, seed 0",
                seed=state["config"]["seed"], date=date.today().isoformat(),
                machine=f"{os.cpu_count()} CPU cores, {platform.machine()}, "
                        f"torch {torch.__version__.partition('+')[0]}")


@torch.no_grad()
def measure(chain, n=64):
    """PSNR in dB on n drawings held out of training: Stage A alone, and compressor + B + A."""
    size = chain.b.config.image_size
    scenes = [shapes.scene(index, "heldout") for index in range(n)]
    images = torch.stack([to_tensor(shapes.render(scene, size)) for scene in scenes])
    captions = [shapes.caption(scene) for scene in scenes]
    sem = chain.compressor.standardise(chain.compressor(semantic_compressor.resize(images)))
    drawn = stage_b.draw_images(chain, sem, captions, range(n), guidance=1.0)
    by_a = chain.a.decode(chain.a.encode(images))
    return dict(psnr_a=round(float(pictures.psnr(by_a, images)), 2),
                psnr_compressor_b_a=round(float(pictures.psnr(drawn, images)), 2),
                on=f"{n} held-out drawings, 12 steps, guidance 1")


def write(path, state, tensors, origin):
    """One safetensors file; `state` is JSON in its metadata."""
    save_file({name: value.contiguous() for name, value in tensors.items()}, path,
              {"format": "pt", "checkpoint": json.dumps(state), "provenance": json.dumps(origin),
               "sha256": checkpoint.checksum(tensors)})


def ship(paths, out):
    """paths: as sample.find returns them. Writes three files into the folder `out`."""
    states = {stage: checkpoint.load_checkpoint(paths[stage], stage.upper()) for stage in "abc"}
    kept = ("stage", "config", "step", "samples", "compressor_config", "text_encoder",
            "probe")
    about = {stage: {name: state[name] for name in kept if name in state}
             for stage, state in states.items()}
    a = rounded(states["a"]["model"])
    compressor = rounded(states["b"]["compressor_ema"])
    tensors = {"a": a, "c": rounded(states["c"]["ema"]), "b": {
        **rounded(states["b"]["ema"]),
        **{f"compressor.{name}": value for name, value in compressor.items()}}}
    about["b"]["stage_a"] = checkpoint.checksum(restored(a))
    about["c"]["compressor"] = checkpoint.checksum(restored(compressor))
    origin = {stage: provenance(states[stage]) for stage in "abc"}
    out.mkdir(parents=True, exist_ok=True)
    for final in (False, True):                    # first without measures, then with them
        if final:
            measures = measure(sample.load_chain(**sample.find(out)))
            origin = {stage: dict(one, **measures) for stage, one in origin.items()}
        for stage in "abc":
            write(out / f"stage_{stage}.safetensors", about[stage], tensors[stage], origin[stage])
    return origin


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--weights", default="runs/pocket", help="a folder that training left")
    parser.add_argument("--out", default=Path(__file__).resolve().parent, type=Path)
    settings = parser.parse_args()
    for stage, origin in ship(sample.find(settings.weights), settings.out).items():
        path = settings.out / f"stage_{stage}.safetensors"
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {json.dumps(origin)}")


if __name__ == "__main__":
    cli.start(main)

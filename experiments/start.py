"""Where should Stage B start: random codebook tokens (§3.3) or Gaussian noise (released code)?

    python -m experiments.start --data shards/heldout [--weights runs/pocket] [--n 64]

Sends drawings through Stage A alone and through compressor, Stage B and Stage A, from both starts
and at guidance 1 and 4, and prints the PSNR of each way in dB.
"""

from pathlib import Path

import torch
from tqdm import tqdm

import data
import sample
import semantic_compressor
import stage_b
from plumbing import cli, pictures, training


@torch.no_grad()
def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", required=True, help="captioned images (data.py)")
    parser.add_argument("--weights", default="runs/pocket", type=Path)
    parser.add_argument("--n", type=int, default=64, help="how many pictures")
    settings = parser.parse_args()
    training.setup(0)
    chain = sample.load_chain(**sample.find(settings.weights, "ab"))
    size = chain.b.config.image_size
    dataset = data.CaptionedImages(settings.data, resize=size, crop=size, center=True)
    if settings.n > len(dataset):
        raise cli.UsageError(f"--n {settings.n}: {settings.data} holds {len(dataset)} images")
    if chain.compressor is None:
        raise cli.UsageError(f"{settings.weights}: found no Semantic Compressor, expected one")
    batch = next(data.stream(dataset, settings.n))
    images, captions = batch["images"], batch["captions"]
    sem = chain.compressor.standardise(chain.compressor(semantic_compressor.resize(images)))
    print(f"Stage A alone: {pictures.psnr(chain.a.decode(chain.a.encode(images)), images):.1f} dB")
    for start in tqdm(("tokens", "gaussian"), desc="starts"):
        for guidance in (1.0, 4.0):
            drawn = stage_b.draw_images(chain, sem, captions, range(len(images)), start=start,
                                       guidance=guidance)
            tqdm.write(f"compressor + B + A, start {start:8}, guidance {guidance:.0f}: "
                       f"{pictures.psnr(drawn, images):.1f} dB")


if __name__ == "__main__":
    cli.start(main)

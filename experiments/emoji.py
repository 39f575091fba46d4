"""Real pictures without a download: the emoji of the Noto Color Emoji font, named by Unicode.

    apt-get install fonts-noto-color-emoji
    python -m experiments.emoji --out emoji       about 1,300 PNGs of 136 px, each with a .txt
    python -m tools.pack emoji --out shards/emoji

Names that say "black" or "white" are left out: in Unicode they mean filled and outlined.
The font is under the SIL Open Font License 1.1, its pictures under Apache-2.0; commit neither.
"""

import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from plumbing import cli

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"    # where Debian and Ubuntu put it
RANGES = (range(0x2300, 0x2C00), range(0x1F000, 0x1FB00))     # symbols and pictographs


def draw(character, font):
    """One emoji, centred on a white square of 136 px; None if the font has no picture of it."""
    picture = Image.new("RGBA", (136, 136), (255, 255, 255, 0))
    left, top, right, bottom = font.getbbox(character)
    ImageDraw.Draw(picture).text(((136 - right - left) / 2, (136 - bottom - top) / 2), character,
                                 font=font, embedded_color=True)
    if picture.getbbox() is None:
        return None
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--out", required=True, help="folder for the pictures and captions")
    parser.add_argument("--font", default=FONT, help=f"default {FONT}")
    settings = parser.parse_args()
    try:
        font = ImageFont.truetype(settings.font, 109)         # the one size of its bitmaps
    except OSError as error:
        raise cli.UsageError(f"{settings.font}: expected the Noto Color Emoji font ({error}); "
                             "apt-get install fonts-noto-color-emoji, or give --font") from None
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    missing = font.getmask("\U0010FFFF").getbbox()            # the shape of "no such character"
    count = 0
    for code in tqdm([code for some in RANGES for code in some]):
        name = unicodedata.name(chr(code), "").lower()
        if not name or set(name.split()) & {"black", "white"}:
            continue
        picture = draw(chr(code), font)
        if picture is None or font.getmask(chr(code)).getbbox() == missing:
            continue
        picture.save(out / f"{code:05x}.png")
        (out / f"{code:05x}.txt").write_text(name, encoding="utf-8")
        count += 1
    print(f"{out}: {count} pictures with captions")


if __name__ == "__main__":
    cli.start(main)

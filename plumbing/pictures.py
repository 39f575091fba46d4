"""Tensors as pictures: sheets with captions, a latent in colours, and PSNR."""

import unicodedata

import torch
from PIL import Image, ImageDraw, ImageFont

SPELT = str.maketrans(dict(zip("äöüÄÖÜßæø’“”–—", "ae oe ue Ae Oe Ue ss ae oe ' \" \" - -".split())))


def to_pil(image):
    """(3, H, W) float in [0, 1] -> PIL image; anything outside is clamped."""
    array = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).numpy())


def grid(images, columns, captions=None, scale=1):
    """Put pictures, (3, H, W) or PIL's, on a sheet, row by row; a caption stands below each."""
    images = [image if isinstance(image, Image.Image) else to_pil(image) for image in images]
    width, height = (side * scale for side in images[0].size)
    font, line = ImageFont.load_default(11), 13
    texts = [wrap(plain(text[:401]), width, font) for text in captions or [""] * len(images)]
    below = line * max(text.count("\n") + 1 for text in texts) + 3 if captions else 0
    size = (columns * (width + 4) + 4, -(-len(images) // columns) * (height + below + 4) + 4)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for index, (image, text) in enumerate(zip(images, texts)):
        x, y = 4 + index % columns * (width + 4), 4 + index // columns * (height + below + 4)
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        pen.rectangle((x - 1, y - 1, x + width, y + height), outline=(200, 200, 200))
        pen.multiline_text((x, y + height + 1), text, fill="black", font=font, spacing=1)
    return sheet


def plain(text):
    """Text in ASCII, which is what Pillow's own font has: ä is ae, é is e, what is left is ?."""
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFC", text).translate(SPELT))
    text = "".join(one for one in text if not unicodedata.combining(one))
    return text.encode("ascii", "replace").decode()


def wrap(text, width, font):
    """Break a caption, or its first 400 letters, into lines under a picture `width` pixels wide."""
    text, lines = text if len(text) <= 400 else f"{text[:397]}...", [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        fits = not lines[-1] or font.getlength(longer) <= width
        lines = lines[:-1] + [longer] if fits else lines + [word]
        while len(lines[-1]) > 1 and font.getlength(lines[-1]) > width:    # one word is too long
            end = next(n for n in range(1, len(lines[-1]))
                       if font.getlength(lines[-1][:n + 1]) > width)
            lines[-1:] = [lines[-1][:end], lines[-1][end:]]
    return "\n".join(lines)


def latent_picture(latents, channels=3):
    """(B, C, h, w) latents -> (B, 3, 8h, 8w) in [0, 1]: three channels, ±3 standard deviations."""
    three = latents[:, :channels].float().cpu() / 6 + 0.5
    return three.repeat_interleave(8, -1).repeat_interleave(8, -2).clamp(0, 1)


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of pictures in [0, 1], averaged over the batch: a scalar."""
    error = (a.float().clamp(0, 1) - b.float().clamp(0, 1)).square().mean((1, 2, 3))
    return (-10 * error.clamp_min(1e-10).log10()).mean()

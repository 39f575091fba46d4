"""Write the stages that were trained here as diffusers reads them.

    python -m published.export runs/released --out DIR

    DIR/wuerstchen/            Stages A and B
    DIR/wuerstchen-prior/      Stage C
    DIR/EfficientNetEncoder/   the Semantic Compressor

diffusers has one Stage B, that of `--preset released`. The text encoders and tokenizers are not
written: they are those of warp-ai/wuerstchen and warp-ai/wuerstchen-prior, unchanged.
"""

import json
from pathlib import Path

from plumbing import cli
from published import hub, weights

TEXT = {"scheduler": ["diffusers", "DDPMWuerstchenScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizerFast"]}
SCHEDULER = dict(_class_name="DDPMWuerstchenScheduler", s=0.008, scaler=1.0)


def export(chain, folder):
    """Write A, B, C and the compressor of a sample.Chain into `folder`.

    Raises UsageError, before it writes, where diffusers has no such network.
    """
    networks = dict(A=chain.a, B=chain.b, C=chain.c, compressor=chain.compressor)
    theirs = {stage: weights.to_diffusers(stage, network.config, network.state_dict())
              for stage, network in networks.items() if network is not None}
    for stage, (config, tensors) in theirs.items():
        weights.write_folder(Path(folder) / hub.FOLDERS[stage.lower()], config, tensors)
    # diffusers calls the divisor "latent_mean" and the offset "latent_std": raw = x * mean - std
    mean, std = chain.scale if chain.b.config.condition == "raw" else (0.0, 1.0)
    pipelines = {
        "wuerstchen": dict(_class_name="WuerstchenDecoderPipeline", latent_dim_scale=10.67,
                           decoder=["wuerstchen", "WuerstchenDiffNeXt"],
                           vqgan=["wuerstchen", "PaellaVQModel"], **TEXT),
        "wuerstchen-prior": dict(_class_name="WuerstchenPriorPipeline", latent_mean=std,
                                 latent_std=-mean, resolution_multiple=42.67,
                                 prior=["wuerstchen", "WuerstchenPrior"], **TEXT)}
    for name, index in pipelines.items():
        (Path(folder) / name / "scheduler").mkdir(exist_ok=True)
        for file, content in (("model_index.json", index),
                              ("scheduler/scheduler_config.json", SCHEDULER)):
            (Path(folder) / name / file).write_text(json.dumps(content, indent=2) + "\n")


def main(argv=None):
    parser = cli.Parser(__doc__, prog="python -m published.export")
    parser.add_argument("weights", help="a folder of weights, pocket or released, as in sample.py")
    parser.add_argument("--out", required=True, metavar="DIR", help="where they are written")
    for part in ("--stage-a", "--stage-b", "--stage-c", "--compressor"):
        parser.add_argument(part, metavar="PATH", help="before that of weights; or released")
    parser.add_argument("--clip", metavar="PATH", help="weights of the CLIP text encoders")
    settings = parser.parse_args(argv)
    import sample
    paths = sample.find(settings.weights, a=settings.stage_a, b=settings.stage_b,
                        c=settings.stage_c, compressor=settings.compressor)
    chain = sample.load_chain(**paths, clip=settings.clip)
    export(chain, settings.out)
    print(f"{settings.out}: wuerstchen/ and wuerstchen-prior/, as diffusers reads them")


if __name__ == "__main__":
    cli.start(main)

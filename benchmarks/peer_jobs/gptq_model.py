"""GPTQModel with its own defaults, in groups of 128.

Its pool of CPU threads has half as many workers as there are cores, and its loader asks for two:
with fewer than three cores it raises at import. Its own variable GPTQMODEL_CPU_WORKERS fixes that.
"""

import os

if (os.cpu_count() or 1) < 3:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

from arguments import Arguments, parse
from gptqmodel import GPTQModel, QuantizeConfig
from transformers import AutoConfig


def quantize(given: Arguments) -> None:
    # With offloading it looks for the output matrix on disk by the name lm_head; GPT-NeoX has
    # another name for it, and saving would fail.
    offload = AutoConfig.from_pretrained(given.model).model_type != "gpt_neox"
    chosen = {"group_size": 128, "offload_to_disk": offload}
    if given.job == "gptq":
        config = QuantizeConfig(bits=given.bits, sym=given.symmetric, **chosen)
    else:
        config = QuantizeConfig(
            bits=given.bits, sym=False, quant_method="awq", format="gemm", **chosen
        )
    model = GPTQModel.load(given.model, config, device=given.device)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in given.rows]
    model.quantize(rows, batch_size=1)
    model.save(str(given.out))


if __name__ == "__main__":
    quantize(parse())

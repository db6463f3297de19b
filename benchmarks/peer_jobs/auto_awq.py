"""AutoAWQ with its own defaults, in groups of 128."""

from arguments import Arguments, parse
from awq import AutoAWQForCausalLM
from transformers import PreTrainedTokenizerFast


def quantize(given: Arguments) -> None:
    device_map = "auto" if given.device == "cuda" else "cpu"
    model = AutoAWQForCausalLM.from_pretrained(given.model, device_map=device_map)
    # Not AutoTokenizer: it would look for the class that the checkpoint names, which this older
    # transformers doesn't have.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(given.model)
    model.quantize(
        tokenizer,
        quant_config={
            "zero_point": True,
            "q_group_size": 128,
            "w_bit": given.bits,
            "version": "GEMM",
        },
        calib_data=given.rows,
        max_calib_samples=len(given.rows),
        max_calib_seq_len=len(given.rows[0]),
    )
    model.save_quantized(str(given.out))
    tokenizer.save_pretrained(str(given.out))


if __name__ == "__main__":
    quantize(parse())

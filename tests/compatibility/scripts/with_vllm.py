"""vLLM: its own loader, its own kernels."""

import exchange
from vllm import LLM, SamplingParams


def main() -> None:
    job = exchange.receive()
    longest = max(len(row) + 1 for row in job.rows)
    longest = max(longest, *(len(prompt) + job.new_tokens for prompt in job.prompts))
    llm = LLM(
        model=job.path,
        dtype=job.dtype,
        enforce_eager=True,
        max_model_len=longest,
        max_num_seqs=16,
        max_logprobs=-1,
        enable_prefix_caching=False,
    )
    greedy = SamplingParams(temperature=0, max_tokens=job.new_tokens, stop_token_ids=job.end)
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in job.prompts], greedy)
    reading = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1)
    read = llm.generate([{"prompt_token_ids": row} for row in job.rows], reading)
    exchange.give(
        exchange.Answer(
            [list(answer.outputs[0].token_ids) for answer in answers],
            # Nothing predicts a row's first token.
            [
                [[place[token].logprob for token in range(len(place))] for place in places]
                for places in (result.prompt_logprobs[1:] for result in read)
            ],
        )
    )


if __name__ == "__main__":
    main()

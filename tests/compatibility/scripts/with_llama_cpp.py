"""llama.cpp, by the wheel that quantkit uses."""

from pathlib import Path

import exchange

from quantkit.engines.llamacpp import LlamaCpp


def main() -> None:
    job = exchange.receive()
    longest = max(len(row) for row in job.rows)
    longest = max(longest, *(len(prompt) + job.new_tokens for prompt in job.prompts))
    with LlamaCpp(Path(job.path), context=longest + 8) as engine:
        exchange.give(
            exchange.Answer(
                [engine.generate(prompt, job.new_tokens).ids for prompt in job.prompts],
                [
                    [engine.log_probabilities(row[:end]) for end in range(1, len(row))]
                    for row in job.rows
                ],
            )
        )


if __name__ == "__main__":
    main()

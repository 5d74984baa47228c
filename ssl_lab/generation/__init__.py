"""Text from a language model: logits processors, sampling, beam search, prompts."""

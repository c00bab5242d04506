"""Fine-tuning a Llama on pairs of prompt and response, and measuring its answers."""

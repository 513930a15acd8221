"""The example configs and the machines for which they are made."""

FITS = {
    "qwen3-1.7b": ["--gpu", "h100", "--solution-tokens", "6000"],
    "qwen3-4b": ["--gpu", "h100", "--solution-tokens", "6000"],
    "qwen3-8b": ["--gpu", "h100", "--solution-tokens", "6000"],
    "grpo": ["--gpu", "h100"],
    "distill": ["--gpu", "h100"],
    "one-24gb-gpu": ["--gpu", "4090", "--prompt-tokens", "300", "--solution-tokens", "300"],
    "two-gpu-fsdp": ["--gpu", "h100", "--gpus", "2", "--solution-tokens", "6000"],
    "laptop": ["--memory", "16GB", "--solution-tokens", "150"],
    "smollm2": ["model.path=SmolLM2-135M", "--memory", "6GB", "--prompt-tokens", "50"],
}

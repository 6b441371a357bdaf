"""The plain training loop on one GPU, without Ray, against transformers and PEFT."""

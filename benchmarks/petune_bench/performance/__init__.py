"""petune beside PEFT with transformers' Trainer: time, memory and bytes kept, interleaved in one process."""

"""Step time and memory of ZeRO, native and DeepSpeed's, beside DistributedDataParallel."""

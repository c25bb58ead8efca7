"""Training: LoRA and full fine-tuning of one task here, sequences of tasks in `ilora` and `sequence`.

Nothing is imported at this level, so that the torch-free settings of a run can be read without torch.
"""

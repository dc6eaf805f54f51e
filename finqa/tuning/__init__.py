"""The parts of fine-tuning (finqa.training).

training_rows        rows as token ids, batches, their order
trainable            a model made ready to train
completion_trainer   the transformers Trainer; training_callbacks: its log; training_figure: its figure
checkpoints          which one to go on from
packing, captured_steps, fp8_base, cpu_attention   what makes a step fast
"""

"""Your own script on transformers.Trainer; the lines marked with # + are what Holdfast adds."""

from datasets import Dataset
from holdfast.trainer.own_trainer import ProtectedTrainerMixin, load_protection  # +
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments


class MyTrainer(ProtectedTrainerMixin, Trainer):  # +
    pass  # +


model, tokenizer = AutoModelForCausalLM.from_pretrained("model"), AutoTokenizer.from_pretrained("model")
texts = ["Ann asks about soup and money", "the answer to them is to take it and run"]
rows = Dataset.from_list([{**tokenizer(text), "labels": tokenizer(text)["input_ids"]} for text in texts * 8])
args = TrainingArguments("out", per_device_train_batch_size=1, max_steps=4, learning_rate=1e-3, logging_steps=1)

protection = load_protection("subspace.safetensors", "model", tokenizer, strength=1.0)  # +
trainer = MyTrainer(model=model, args=args, train_dataset=rows, protection=protection)  # + (protection=)
trainer.train()

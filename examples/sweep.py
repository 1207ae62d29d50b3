"""A sweep over hyperparameters by Optuna, with trackers, through transformers' Trainer.

Performers are models of transformers, so `Trainer.hyperparameter_search` builds and trains them.
Each trial chooses the number of features and the learning rate of a model that learns proteins of
the sample, and reports its loss on held-out ones; the search keeps the lowest.

`report_to` names trackers, several between commas: "tensorboard", "wandb", "mlflow". Without a
network Weights & Biases writes beside the run with WANDB_MODE=offline, and MLflow with
MLFLOW_TRACKING_URI=sqlite:///mlflow.db:

    WANDB_MODE=offline python examples/sweep.py --report-to wandb,tensorboard

It needs `pip install optuna` beside performers[hf], and the trackers that are named.

Measured in 8 s of CPU time on AMD EPYC, 1 thread(s), torch 2.13.0+cpu:

    best loss: 2.926 nats per residue, of 3 trials
    its choices: 16 projections, learning rate 4.5e-03
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

from optuna import Trial
from transformers import Trainer, TrainingArguments

from performers import PerformerConfig, PerformerForCausalLM
from performers.data import VOCAB_SIZE, CausalCollator, load_proteins


@dataclass(frozen=True)
class Settings:
    trials: int = 3
    steps: int = 30
    length: int = 128
    report_to: str = "none"


FULL = Settings()
SMALL = Settings(trials=2, steps=2, length=31)


def build(trial: Trial | None) -> PerformerForCausalLM:
    """The model of a trial, which chooses its features; the Trainer asks for one before as well."""
    num_projections = 16 if trial is None else trial.suggest_categorical("features", [8, 16, 32])
    config = PerformerConfig(
        vocab_size=VOCAB_SIZE,
        attention="performer-positive",
        num_projections=num_projections,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    return PerformerForCausalLM(config)


def choose(trial: Trial) -> dict[str, float]:
    """What a trial chooses of the Trainer's own arguments."""
    return {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 3e-2, log=True)}


def run(settings: Settings) -> dict[str, str]:
    splits = load_proteins("sample", length=settings.length)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=settings.steps,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=32,
            eval_strategy="steps",
            eval_steps=settings.steps,
            save_strategy="no",
            logging_steps=max(1, settings.steps // 4),
            report_to=settings.report_to.split(","),
            disable_tqdm=True,
        )
        trainer = Trainer(
            model_init=build,
            args=arguments,
            data_collator=CausalCollator(),
            train_dataset=splits.train,
            eval_dataset=[splits.valid[row] for row in range(min(64, len(splits.valid)))],
        )
        best = trainer.hyperparameter_search(
            choose,
            n_trials=settings.trials,
            direction="minimize",
            backend="optuna",
            compute_objective=lambda metrics: metrics["eval_loss"],
        )
    chosen = best.hyperparameters
    return {
        "best loss": f"{best.objective:.3f} nats per residue, of {settings.trials} trials",
        "its choices": f"{chosen['features']} projections, learning rate "
        f"{chosen['learning_rate']:.1e}",
    }


if __name__ == "__main__":
    from measured import command

    command(__file__, run, FULL, SMALL)

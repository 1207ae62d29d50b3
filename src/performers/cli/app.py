"""The commands and their help. What they do is in `performers.train`, `viz` and `data`.

Those are imported when a command runs: `performers --help` answers without loading torch.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from performers.cli.benchmark import benchmark
from performers.cli.convert import convert
from performers.cli.diagnose import diagnose
from performers.cli.errors import MISTAKES, one_line_errors

__all__ = ["app", "main"]

app = typer.Typer(
    name="performers",
    help="Train, evaluate and sample from Performers: Transformers with linear-time attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
data_app = typer.Typer(help="Fetch data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.command()(diagnose)
app.command()(benchmark)
app.command()(convert)


def main() -> None:
    """Entry point of the `performers` command."""
    app()


@app.command()
def train(
    config: Annotated[
        str, typer.Argument(help="A YAML file, or the name of a shipped config (see `info`).")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the config to set, dotted."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run; runs/CONFIG unless given.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last whole checkpoint in the folder.")
    ] = False,
    if_exists: Annotated[
        Literal["refuse", "show"],
        typer.Option(
            help="If the folder holds a run: refuse, or show its results (and go on with it "
            "if it is not finished)."
        ),
    ] = "refuse",
) -> None:
    """Train a model and write a report.

    Keys under `trainer` are those of transformers' TrainingArguments, keys under `model` those of
    PerformerConfig.

    Examples:

        performers train demo

        performers train demo model.attention=performer-positive max_seconds=60

        performers train demo trainer.bf16=true --output runs/bf16

        torchrun --nproc-per-node 2 -m performers.cli train demo --output runs/two
    """
    from performers.train import Run, has_finished, holds_run, load_config, results_table

    folder = output or Path("runs") / Path(config).stem
    with one_line_errors():
        if if_exists == "show" and holds_run(folder):
            if has_finished(folder):
                _print_results(folder)
                return
            resume = True
        run = Run.prepare(load_config(config, overrides or []), folder, resume=resume)
    try:
        with one_line_errors((FloatingPointError,)):
            metrics = run.train()
    except KeyboardInterrupt:
        again = ["performers", "train", config, *(overrides or [])]
        again += ["--output", str(folder), "--resume"]
        typer.echo(
            f"\nInterrupted. Every whole checkpoint is kept; go on with: {shlex.join(again)}",
            err=True,
        )
        raise typer.Exit(130) from None
    if metrics is None:  # another rank writes the report
        return
    from performers.viz import write_report

    write_report(folder)
    typer.echo(results_table(metrics))
    typer.echo(f"\nReport: {folder / 'report.html'}")


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A run folder or its model/ folder.")],
    data: Annotated[list[Path], typer.Argument(help="FASTA files, gzipped or not.")],
    length: Annotated[int, typer.Option(help="Crop proteins to this many tokens.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Proteins per batch.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the masked positions.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print accuracy, perplexity and bits per character of a model on proteins.

    Examples:

        performers evaluate runs/demo proteins.fasta.gz

        performers evaluate runs/demo/model one.fasta two.fasta --length 512 --json
    """
    import json

    from performers.train import Evaluation, scores_table

    with one_line_errors():
        evaluation = Evaluation.prepare(
            checkpoint, data, length=length, batch_size=batch_size, seed=seed
        )
    scores = evaluation.run()
    typer.echo(json.dumps(scores, indent=2) if json_output else scores_table(scores))


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A run folder or its model/ folder.")],
    prompt: Annotated[str, typer.Option(help="The residues that every protein begins with.")] = "",
    count: Annotated[int, typer.Option(help="How many proteins.")] = 5,
    length: Annotated[int, typer.Option(help="Longest protein, the prompt included.")] = 256,
    temperature: Annotated[
        float, typer.Option(help="Below 1 the likely gets likelier; 0 always takes the likeliest.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same proteins.")] = 0,
) -> None:
    """Sample proteins from a causal model and print them as FASTA.

    Examples:

        performers generate runs/protein-clm --count 3

        performers generate runs/protein-clm --prompt MKTAYIAK --temperature 0.8 > new.fasta
    """
    from performers.train import Generation

    with one_line_errors():
        generation = Generation.prepare(
            checkpoint,
            prompt=prompt,
            count=count,
            length=length,
            temperature=temperature,
            seed=seed,
        )
    for record in generation.run():
        typer.echo(record)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
) -> None:
    """Draw the report of a run again from its metrics.json.

    Example:

        performers report runs/demo
    """
    from performers.viz import write_report

    with one_line_errors():
        path = write_report(run)
    typer.echo(f"Report: {path}")


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="A folder of experiments/, such as figure-4.")],
    scale: Annotated[
        Literal["smoke", "reduced", "paper"],
        typer.Option(help="Seconds, a minute, or the paper's own sizes."),
    ] = "reduced",
    draw_only: Annotated[
        bool, typer.Option("--draw-only", help="Draw again from the numbers of an earlier run.")
    ] = False,
) -> None:
    """Run an experiment of the paper and save its numbers, its figure and its README.

    Examples:

        performers reproduce figure-4 --scale smoke

        performers reproduce theorem-1 --scale paper --draw-only
    """
    from performers.cli import reproduce as experiments

    with one_line_errors():
        folder = experiments.experiment_folder(name)
        if draw_only:
            written = experiments.draw(folder, scale)
    if not draw_only:
        written = experiments.reproduce(folder, scale, typer.echo)
    for path in written:
        typer.echo(f"Wrote {path}")


@app.command()
def info() -> None:
    """Print versions, hardware, and the words that configs may use.

    Example:

        performers info
    """
    from performers.cli.info import describe

    typer.echo(describe())


@data_app.command()
def proteins(
    output: Annotated[Path, typer.Argument(help="The file to write, NAME.fasta.gz.")],
    source: Annotated[
        str, typer.Option(help="swissprot (435,059 proteins), examples (18,801), or fasta.")
    ] = "swissprot",
    from_path: Annotated[
        list[Path] | None,
        typer.Option("--from", help="A .deb or unpacked folder to read instead of downloading."),
    ] = None,
    clustering: Annotated[
        Literal["mmseqs", "kmers"] | None,
        typer.Option(help="How homologues are found; chosen by size unless given."),
    ] = None,
) -> None:
    """Write a set of distinct proteins with clusters of homologues, and a card that says
    where it came from.

    Debian's packages of UniProt sequences are downloaded with apt-get.

    Examples:

        performers data proteins swissprot.fasta.gz

        performers data proteins mine.fasta.gz --source fasta --from a.fasta --from b.fasta.gz

        performers train protein-mlm 'data.source=[swissprot.fasta.gz]'
    """
    from performers.data.fetch import fetch_proteins

    with one_line_errors((*MISTAKES, RuntimeError)):
        card = fetch_proteins(
            output, source, from_paths=from_path or [], clustering=clustering, report=typer.echo
        )
    typer.echo(f"Wrote {output}: {card['counts']}")


def _print_results(folder: Path) -> None:
    import json

    from performers.train import results_table

    report = folder / "report.html"
    if not report.exists():
        from performers.viz import write_report

        write_report(folder)
    typer.echo(results_table(json.loads((folder / "metrics.json").read_text(encoding="utf-8"))))
    typer.echo(f"\nThis run is finished. Report: {report}")

"""Mutation testing: one small fault at a time is put into a module, and a test must notice.

    python tests/mutants.py src/performers/functional/favor.py --sample 20 --seed 1

A mutant is a module with one edit in the body of a function. pytest imports everything and collects
the tests once. One fork of that process runs them and records which test ran which line, by
coverage.py. Then each mutant is a fork in which the code of one function is exchanged: no file is
written, and nothing is imported again. The tests that ran the edited lines run in it, the fastest
first, until one fails. Only forks work, so this needs Linux or macOS.

Left alone are module level, defaults of arguments, annotations, strings, assertions and the texts
of errors. mutmut exchanges functions too, but wraps each in a dispatcher that torch.compile cannot
trace, and has no samples; cosmic-ray starts a process per mutant, which imports torch each time.

What is found goes to tests/mutants.json, where a person writes `explanation`, and from there to
tests/MUTANTS.md.
"""

from __future__ import annotations

import argparse
import ast
import functools
import gc
import inspect
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coverage
import pytest

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "tests" / "mutants.json"
DOCUMENT = ROOT / "tests" / "MUTANTS.md"

# What is mutated, and the tests that say most about it. Its own doctests run as well.
NEAR_FIELDS = ("laws/test_near_field.py", "laws/test_heavy_keys.py", "laws/test_state.py")
SHARP = ("laws/test_sharp.py", "statistics/test_sharp.py")
PARTS = {
    "src/performers/functional/autocast.py": ("functional/test_autocast.py",),
    "src/performers/functional/favor.py": ("functional/test_errors.py", *NEAR_FIELDS, *SHARP),
    "src/performers/functional/features.py": (
        "statistics/test_unbiased.py",
        "laws/test_definition.py",
    ),
    "src/performers/functional/moments.py": SHARP,
    "src/performers/functional/sharp.py": (
        "functional/test_errors.py",
        "backends/test_sides.py",
        *SHARP,
    ),
    "src/performers/functional": (
        "functional",
        "laws/test_definition.py",
        "laws/test_masks.py",
        "laws/test_state.py",
        "statistics/test_projections.py",
    ),
    "src/performers/backends/blocks": ("backends/test_sides.py", *NEAR_FIELDS),
    "src/performers/backends/kernel_chunks.py": ("backends/test_kernel_tiles.py",),
    "src/performers/backends/kernel_maps.py": (
        "backends/test_kernel_tiles.py",
        "laws/test_masks.py",
    ),
    "src/performers/backends/kernel_tiles.py": ("backends/test_kernel_tiles.py",),
    "src/performers/backends/fused_softmax.py": ("backends/test_fused_softmax.py",),
    "src/performers/backends": (
        "backends/test_buffers.py",
        "backends/test_choice.py",
        "backends/test_derivatives.py",
        "backends/test_landmarks.py",
        "backends/test_plain.py",
        "backends/test_reference.py",
        "backends/test_slots.py",
        "backends/test_tiles.py",
        "laws/test_causality.py",
        "laws/test_definition.py",
        "laws/test_derivatives.py",
        "laws/test_gradients.py",
        "laws/test_masks.py",
        "laws/test_scan.py",
        *NEAR_FIELDS,
    ),
    "src/performers/nn": ("nn", *SHARP),
    "src/performers/models": ("models", "nn/test_dialect.py"),
    "src/performers/train/metrics.py": ("train/test_metrics.py", "train/test_evaluate.py"),
    "src/performers/data/masking.py": ("data/test_masking.py",),
}
SECONDS = 30.0  # of tests for one mutant, in time of the processor when they were recorded
MEMORY = 16 * 2**30  # a mutated size must not take all memory of the machine

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}


@dataclass(frozen=True)
class Mutant:
    """A module with `new` in the place of `old`, a node of its tree, in words and in a function."""

    old: ast.AST
    new: ast.AST
    words: str
    function: str

    def lines(self) -> range:
        return range(self.old.lineno, self.old.end_lineno + 1)


def edits(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """What may stand in the place of a node, and what that changes."""
    before = ast.unparse(node)

    def instead(new: ast.AST) -> tuple[ast.AST, str]:
        return new, f"{before} → {ast.unparse(new)}"

    match node:
        case ast.Compare(left, [op], comparators):
            for other in COMPARISONS[type(op)]:
                yield instead(ast.Compare(left, [other()], comparators))
        case ast.BinOp(left, op, right) if type(op) in ARITHMETIC:
            yield instead(ast.BinOp(left, ARITHMETIC[type(op)](), right))
        case ast.AugAssign(target, op, value) if type(op) in ARITHMETIC:
            yield instead(ast.AugAssign(target, ARITHMETIC[type(op)](), value))
            yield ast.Pass(), f"without {before}"
        case ast.BoolOp(op, values):
            yield instead(ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values))
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield instead(operand)
        case ast.If(test, body, orelse) if isinstance(test, ast.Name | ast.Attribute | ast.Call):
            negated = ast.UnaryOp(ast.Not(), test)
            yield ast.If(negated, body, orelse), f"if {ast.unparse(negated)}"
        case ast.IfExp(test, body, orelse) if isinstance(test, ast.Name | ast.Attribute | ast.Call):
            yield instead(ast.IfExp(test, orelse, body))
        case ast.Constant(bool() as value):
            yield instead(ast.Constant(not value))
        case ast.Constant(int() as value):
            yield instead(ast.Constant(value + 1))
        case ast.Constant(float() as value):
            yield instead(ast.Constant(2 * value or 1.0))
        case ast.Call(function, arguments, keywords):
            for out in keywords:
                if out.arg not in (None, "device", "strict"):  # the tests know but one device
                    kept = [keyword for keyword in keywords if keyword is not out]
                    yield ast.Call(function, arguments, kept), f"without {ast.unparse(out)}"
        case ast.Return(value) if value is not None and ast.unparse(value) != "None":
            yield ast.Return(ast.Constant(None)), "return None"
        case ast.Expr(ast.Call()) | ast.Raise():
            yield ast.Pass(), f"without {before}"
        # A name that has no value yet would stop the function at once.
        case ast.Assign([target], value) if not isinstance(target, ast.Name | ast.Tuple) or (
            isinstance(target, ast.Name)
            and any(isinstance(n, ast.Name) and n.id == target.id for n in ast.walk(value))
        ):
            yield ast.Pass(), f"without {before}"


def mutants(tree: ast.AST, function: str = "", inside: bool = False) -> Iterator[Mutant]:
    """All mutants of a module, in the order of its text; `inside` the body of a function or not."""
    for name, field in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        editable = inside or (isinstance(tree, ast.FunctionDef | ast.Lambda) and name == "body")
        for node in field if isinstance(field, list) else [field]:
            if not isinstance(node, ast.AST) or isinstance(node, ast.Assert | ast.JoinedStr):
                continue
            if isinstance(node, ast.keyword) and node.arg == "strict":  # of zip: an assertion
                continue
            if editable:
                yield from (Mutant(node, new, words, function) for new, words in edits(node))
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not editable:
                yield from mutants(node, f"{function}.{node.name}".lstrip("."))
            elif not isinstance(node, ast.Raise):
                yield from mutants(node, function, editable)


class Exchange(ast.NodeTransformer):
    """The tree with the edit of a mutant."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def visit(self, node: ast.AST) -> Any:
        return self.mutant.new if node is self.mutant.old else self.generic_visit(node)


class Module:
    """A file of the package, which pytest has imported, and the mutants to try of it."""

    def __init__(self, path: Path, seed: int, sample: int, only: Sequence[dict[str, Any]] | None):
        self.path = path
        self.name = path.relative_to(ROOT).as_posix() if ROOT in path.parents else path.name
        self.source = path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.source)
        self.mutants = list(mutants(self.tree))
        if only is None:
            chosen = random.Random(f"{seed} {self.name}").sample(
                range(len(self.mutants)), min(sample, len(self.mutants))
            )
            self.tried = [self.mutants[index] for index in sorted(chosen)]
        else:
            wanted = [identity(entry) for entry in only]
            self.tried = [m for m in self.mutants if identity(self.describe(m)) in wanted]

    def describe(self, mutant: Mutant) -> dict[str, Any]:
        """A mutant as the record names it."""
        line = mutant.lines()[0]
        whole = self.source.splitlines()[line - 1]
        return {
            "line": line,
            "column": mutant.old.col_offset - (len(whole) - len(whole.lstrip())),
            "function": mutant.function,
            "text": whole.strip(),
            "change": mutant.words,
        }

    @functools.cached_property
    def codes(self) -> list[tuple[types.CodeType, types.CodeType]]:
        """The code of each function as it runs, and as it is where `ast` has written the text."""
        return list(
            zip(self.compiled(self.source), self.compiled(ast.unparse(self.tree)), strict=True)
        )

    @functools.cached_property
    def functions(self) -> list[types.FunctionType]:
        """What runs code of this file, found once: forks that looked for it would copy the heap."""
        # isinstance would ask lazy modules for their class, which imports them.
        objects = (x for x in gc.get_objects() if type(x) is types.FunctionType)
        return [x for x in objects if x.__code__.co_filename == str(self.path)]

    def compiled(self, source: str) -> Iterator[types.CodeType]:
        """The code of the functions; the loader of the module inserts jaxtyping's checks."""
        file = str(self.path)
        loaded = next(m for m in list(sys.modules.values()) if m.__dict__.get("__file__") == file)
        return functions_of(loaded.__loader__.source_to_code(source.encode(), file))

    def plant(self, mutant: Mutant) -> None:
        """Exchange the code of the function that the mutant edits, in every object that runs it."""
        codes = self.codes  # of the tree without the edit
        edited = ast.unparse(Exchange(mutant).visit(self.tree))
        # An inner function may run already, if it was made at import; else the outer makes it.
        changed = [
            (running, after)
            for (running, before), after in zip(codes, self.compiled(edited), strict=True)
            if before != after
        ]
        planted = 0
        for old, new in changed:
            if not new.co_freevars:  # the edit took the only super()
                new = new.replace(co_freevars=old.co_freevars)
            for function in self.functions:
                if function.__code__ == old and new.co_freevars == old.co_freevars:
                    function.__code__ = new
                    planted += 1
        assert planted, f"no function runs {changed}"


def identity(entry: dict[str, Any]) -> tuple[Any, ...]:
    """What stays of a mutant when lines are inserted above it, or its function is indented."""
    return entry["function"], entry["text"], entry["column"], entry["change"]


def functions_of(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of all functions of a module, methods and inner functions included, in order."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            if constant.co_flags & inspect.CO_OPTIMIZED:
                yield constant
            yield from functions_of(constant)


# The mutants of a module as the record names them, and who killed each; what takes these.
Results = list[tuple[dict[str, Any], str | None]]
Done = Callable[[Module, Results], None]


class Recorder:
    """A pytest plugin: which tests ran which lines of the modules, and how long they took."""

    def __init__(self, folder: Path, modules: Sequence[Module]) -> None:
        self.folder, self.seconds, self.failed = folder, dict[str, float](), set[str]()
        self.coverage = coverage.Coverage(
            data_file=str(folder / "coverage"),
            include=[str(module.path) for module in modules],
            config_file=False,
        )
        self.coverage.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)
        self.began = processor_seconds()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.seconds[nodeid] = processor_seconds() - self.began

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        self.coverage.save()
        passed = {name: time for name, time in self.seconds.items() if name not in self.failed}
        recorded = {"seconds": passed, "failed": sorted(self.failed)}
        (self.folder / "recorded.json").write_text(json.dumps(recorded))


class Killer:
    """A pytest plugin: the name of the test that failed, and no test far longer than it should."""

    def __init__(self, file: Path, seconds: dict[str, float]) -> None:
        self.file, self.seconds = file, seconds
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        for ends in (signal.SIGXCPU, signal.SIGALRM):
            signal.signal(ends, signal.SIG_DFL)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        seconds = int(10 + 5 * self.seconds[nodeid])
        limit = int(time.process_time()) + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        signal.alarm(60 * seconds)  # for one that waits; the machine may be busy

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.file.write_text(report.nodeid)


class Mutation:
    """A pytest plugin that does all of it in the place of running the tests."""

    def __init__(self, modules: Sequence[Module], folder: Path, cases: int, done: Done) -> None:
        self.modules, self.folder, self.cases, self.done = modules, folder, cases, done
        self.in_fork = False

    def fork(self) -> bool:
        """True in a new process; False here, once that has ended."""
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            self.in_fork = True
            return True
        self.status = os.waitpid(pid, 0)[1]
        return False

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """None in a fork, where pytest then runs the tests of the session as ever."""
        plugins = session.config.pluginmanager
        session.items = some_cases(session.items, self.cases)
        for module in self.modules:
            assert module.codes, "there are functions, and every fork has their codes"
            assert module.functions, "the module is imported, and every fork has its functions"
        gc.freeze()  # or the collector of every fork would copy the heap
        if self.fork():
            plugins.register(Recorder(self.folder, self.modules))
            return None
        recorded = json.loads((self.folder / "recorded.json").read_text())
        for name in recorded["failed"]:
            print(f"left out, because it fails without a fault: {name}")
        seconds = recorded["seconds"]
        data = coverage.CoverageData(str(self.folder / "coverage"))
        data.read()
        for module in self.modules:
            ran = data.contexts_by_lineno(str(module.path))
            results: Results = []
            for mutant in module.tried:
                names = {name for line in mutant.lines() for name in ran.get(line, ())}
                tests = fastest({name: seconds[name] for name in names if name in seconds})
                killer = self.folder / "killer"
                killer.unlink(missing_ok=True)
                if self.fork():
                    by_name = {item.nodeid: item for item in session.items}
                    session.items = [by_name[name] for name in tests]
                    session.config.option.maxfail = 1
                    silence = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(silence, 1)
                    os.dup2(silence, 2)
                    module.plant(mutant)
                    plugins.register(Killer(killer, seconds))
                    return None
                entry, killed_by = module.describe(mutant), None
                if killer.exists():
                    killed_by = killer.read_text()
                elif os.WIFSIGNALED(self.status):
                    killed_by = signal.Signals(os.WTERMSIG(self.status)).name
                elif self.status:
                    raise RuntimeError(f"this mutant could not be run: {entry}")
                results.append((entry, killed_by))
                print(entry, len(tests), killed_by or "ALIVE", flush=True)
            self.done(module, results)
        return True


def some_cases(items: Sequence[pytest.Item], number: int) -> list[pytest.Item]:
    """At most so many cases of every parametrized test, drawn at random, as they came.

    None of those that run code in a new process, which imports the package without the fault.
    """
    of_test: dict[str, list[pytest.Item]] = {}
    for item in random.Random(0).sample(items, len(items)):
        if "fresh_python" not in getattr(item, "fixturenames", ()):
            of_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
    chosen = {item for cases in of_test.values() for item in cases[:number]}
    return [item for item in items if item in chosen]


def fastest(seconds: dict[str, float]) -> list[str]:
    """The names of tests by how long they took, as many as take `SECONDS` together."""
    chosen, total = [], 0.0
    for name in sorted(seconds, key=lambda name: (seconds[name], name)):
        total += seconds[name]
        if chosen and total > SECONDS:
            break
        chosen.append(name)
    return chosen


def processor_seconds() -> float:
    """What this process and those that it has waited for took, however busy the machine is."""
    return sum(os.times()[:4])


def mutate(modules: Sequence[Module], tests: Sequence[str], cases: int, done: Done) -> None:
    """Run the mutants of the modules against these tests, and hand over what became of each."""
    with tempfile.TemporaryDirectory() as folder:
        mutation = Mutation(modules, Path(folder), cases, done)
        options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "timeout=0"]
        code = pytest.main([*options, *tests], plugins=[mutation])
        if mutation.in_fork:
            os._exit(code)
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise SystemExit("the tests could not be collected, or a mutant not be run: see above.")


def part_of(path: Path) -> str:
    """The row of PARTS that a file belongs to."""
    for part in PARTS:
        if path == ROOT / part or path.parent == ROOT / part:
            return part
    raise SystemExit(f"a module to mutate must be in one of {', '.join(PARTS)}, got {path}.")


def renew(record: dict[str, Any], module: Module, results: Results, seed: int | None) -> None:
    """Put what became of a module's mutants into the record; explanations stay where they are.

    `seed`: what these were drawn with; None for survivors that were tried again.
    """
    is_again = seed is None
    earlier = record["modules"].get(module.name, {"survivors": []})
    known = {identity(entry): entry for entry in earlier["survivors"]}
    survivors = dict(known) if is_again else {}
    for entry, killed_by in results:
        if killed_by is None or identity(entry) in known:
            explanation = known.get(identity(entry), {}).get("explanation", "")
            survivors[identity(entry)] = {
                **entry,
                "killed_by": killed_by,
                "explanation": "" if killed_by else explanation,
            }
    record["modules"][module.name] = {
        "mutants": len(module.mutants),
        "tried": earlier["tried"] if is_again else len(results),
        "seed": earlier["seed"] if is_again else seed,
        "survivors": sorted(survivors.values(), key=lambda entry: entry["line"]),
    }


def write_document(record: dict[str, Any]) -> None:
    """The two tables of tests/MUTANTS.md."""
    from performers.records import markdown_table, write_block

    counts: dict[str, tuple[int, ...]] = {}
    seeds = {}
    places = [["place", "statement", "change", "what became of it"]]
    for name, module in sorted(record["modules"].items()):
        living = [entry for entry in module["survivors"] if not entry["killed_by"]]
        equivalent = sum(bool(entry["explanation"]) for entry in living)
        killed, alive = module["tried"] - len(living), len(living) - equivalent
        short = name.removeprefix("src/performers/")
        counts[short] = (module["mutants"], module["tried"], killed, equivalent, alive)
        seeds[f"`{short}`"] = str(module["seed"])
        for entry in module["survivors"]:
            fate = f"killed by `{entry['killed_by']}`" if entry["killed_by"] else "alive"
            if entry["explanation"]:
                fate = f"equivalent: {entry['explanation']}"
            cells = [f"`{short}:{entry['line']}`", f"`{entry['text']}`", f"`{entry['change']}`"]
            places.append([cell.replace("|", r"\|") for cell in [*cells, fate]])
    rows = {f"`{short}`": [numbers] for short, numbers in counts.items()}
    for short, numbers in counts.items():
        rows.setdefault(f"these of `{short.partition('/')[0]}`", []).append(numbers)
    rows["all"] = [*counts.values()]
    scores = [["module", "seed", "mutants", "tried", "killed", "equivalent", "alive", "score"]]
    for name, parts in rows.items():
        sums = [sum(column) for column in zip(*parts, strict=True)]
        _, _, killed, _, alive = sums
        score = killed / (killed + alive) if killed + alive else 1.0
        scores.append([name, seeds.get(name, ""), *map(str, sums), f"{score:.0%}"])
    write_block(DOCUMENT, "scores", markdown_table(scores))
    write_block(DOCUMENT, "survivors", markdown_table(places))


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutation testing of modules of the package.")
    parser.add_argument("modules", nargs="*", type=Path, help="their files; none: all of them")
    parser.add_argument("--sample", type=int, default=12, help="how many mutants of a module")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--cases", type=int, default=3, help="of each test, that are run")
    parser.add_argument("--tests", nargs="+", help="to run in the place of those of the table")
    parser.add_argument("--survivors", action="store_true", help="only what the record says lives")
    parser.add_argument("--write", action="store_true", help="only write the document again")
    arguments = parser.parse_args()
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if not arguments.write:
        os.chdir(ROOT)
        seed = None if arguments.survivors else arguments.seed
        every = (sorted((ROOT / part).glob("*.py")) or [ROOT / part] for part in PARTS)
        paths = [path.resolve() for path in arguments.modules] or [
            *dict.fromkeys(path for part in every for path in part)
        ]
        modules = []
        for path in paths:
            only = None
            if arguments.survivors:
                known = record["modules"].get(path.relative_to(ROOT).as_posix(), {"survivors": []})
                only = [
                    entry
                    for entry in known["survivors"]
                    if not entry["killed_by"] and not entry["explanation"]
                ]
            modules.append(Module(path, arguments.seed, arguments.sample, only))
        modules = [module for module in modules if module.tried]
        tests = arguments.tests or dict.fromkeys(
            f"tests/{test}" for module in modules for test in PARTS[part_of(module.path)]
        )

        def done(module: Module, results: Results) -> None:
            renew(record, module, results, seed)
            text = json.dumps(record, indent=1, ensure_ascii=False)
            RECORD.write_text(text + "\n", encoding="utf-8")

        doctests = [module.name for module in modules]
        mutate(modules, [*tests, *doctests], arguments.cases, done)
    write_document(record)


if __name__ == "__main__":
    main()

"""Finds the rooms of the house and the imports between them with Python's parser; runs nothing.

A room is a package of `opsd`. Modules directly in `opsd` are the room `opsd`; the kernels are one
room and their adapters another. All imports count: in a module's body, in a function, and strings
that name one of our modules (for importlib). Imports for type checkers do not count, nor do
libraries that ctypes loads.

    python -m tests.helpers.rooms       prints the rooms, the arrows between them and the figures
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
# From the top. A room imports only from the rooms after it.
ORDER = """
opsd_kernels.adapters
opsd cli quickstart plan compare training report evaluate objectives grading prefix rollout models
runs data distributed config common
opsd_kernels
""".split()

IMPORTERS = {"import_module", "find_spec", "run_module", "__import__"}


@dataclass(frozen=True)
class Import:
    """`from module import name as bound`, or `import module` if `name` is empty."""

    module: str
    name: str = ""
    bound: str = ""
    in_function: bool = False


@dataclass(frozen=True)
class Module:
    """One of our files, as Python's parser sees it."""

    name: str
    path: Path
    ours: frozenset[str] = field(repr=False)  # the names of all our modules

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def lines(self) -> int:
        return self.text.count("\n")

    @property
    def room(self) -> str:
        package, _, rest = self.name.partition(".")
        if package != "opsd":
            return "opsd_kernels.adapters" if rest.startswith("adapters") else package
        is_room = self.path.name == "__init__.py" or "." in rest
        return rest.partition(".")[0] if rest and is_room else package

    @cached_property
    def imports(self) -> list[Import]:
        """Its imports of our modules."""
        return [*self._imports(self.tree, False)]

    def _imports(self, node: ast.AST, inside: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                names = (alias.name for alias in child.names)
                yield from (Import(name) for name in names if name in self.ours)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{self.name} has a relative import"
                for alias in child.names:
                    if (whole := f"{child.module}.{alias.name}") in self.ours:
                        yield Import(whole)
                    elif child.module in self.ours:
                        bound = alias.asname or alias.name
                        yield Import(child.module, alias.name, bound, inside)
            elif isinstance(child, ast.Call | ast.Constant):
                yield from (Import(name) for name in self._named(child))
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from self._imports(child, inside or is_function)

    def _named(self, node: ast.Call | ast.Constant) -> set[str]:
        """Our modules that a string names, for importlib or a table of lazy imports."""
        if isinstance(node, ast.Constant):
            name = node.value if isinstance(node.value, str) else ""
            while name.count(".") and name not in self.ours:
                name = name.rpartition("." if ":" not in name else ":")[0]
            own = self.name if self.path.stem == "__init__" else self.name.rpartition(".")[0]
            return {name} - {own} if name.count(".") else set()  # its package is imported already
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if called not in IMPORTERS or not node.args:
            return set()
        match node.args[0]:
            case ast.Constant(value=str(name)):
                return {name} & self.ours
            case ast.JoinedStr(values=[ast.Constant(value=str(start)), *_]):
                return {name for name in self.ours if name.startswith(start)}
        return set()

    @cached_property
    def origins(self) -> dict[str, Import]:
        """Names that others could import from here although they are defined elsewhere."""
        return {found.bound: found for found in self.imports if not found.in_function}

    @cached_property
    def functions(self) -> dict[str, int]:
        """The number of lines of each function, without its signature and docstring."""
        found = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                last = node.end_lineno or 0
                found[f"{self.name}.{node.name}"] = last + 1 - body[0].lineno if body else 0
        return found


class House:
    """The packages below `root`, and the imports between their modules."""

    def __init__(self, root: Path):
        files = {
            ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
            for package in ("opsd", "opsd_kernels")
            for path in sorted((root / package).rglob("*.py"))
        }
        ours = frozenset(files)
        self.modules = {name: Module(name, path, ours) for name, path in files.items()}

    def targets(self, found: Import) -> set[str]:
        """The modules behind an import: the one it names, and the one that defines the name."""
        targets = {found.module}
        while found.name and (origin := self.modules[found.module].origins.get(found.name)):
            found = origin
            targets.add(found.module)
        return targets

    @cached_property
    def graph(self) -> dict[str, set[str]]:
        """For each module, the modules that it imports."""
        return {
            name: {target for found in module.imports for target in self.targets(found)} - {name}
            for name, module in self.modules.items()
        }

    @property
    def arrows(self) -> dict[tuple[str, str], list[str]]:
        """The imports from room to room, as 'importer -> imported'."""
        found: dict[tuple[str, str], list[str]] = {}
        for name, targets in self.graph.items():
            for target in sorted(targets):
                rooms = self.modules[name].room, self.modules[target].room
                if rooms[0] != rooms[1]:
                    found.setdefault(rooms, []).append(f"{name} -> {target}")
        return found

    @property
    def rooms(self) -> dict[str, list[Module]]:
        """The modules of each room, from the top."""
        found: dict[str, list[Module]] = {}
        for module in self.modules.values():
            found.setdefault(module.room, []).append(module)
        unknown = set(found) - set(ORDER)
        assert not unknown, f"ORDER does not say where these rooms stand: {sorted(unknown)}"
        return {room: found[room] for room in ORDER if room in found}

    def upward(self) -> list[str]:
        """Imports from a room above, as 'importer -> imported'."""
        ranks = {room: rank for rank, room in enumerate(ORDER)}
        pairs = self.arrows.items()
        return [line for (a, b), lines in pairs if ranks[a] > ranks[b] for line in lines]

    def in_cycles(self) -> list[str]:
        """Modules that import themselves through others."""

        def reached(start: str) -> set[str]:
            found: set[str] = set()
            waiting = [*self.graph[start]]
            while waiting:
                name = waiting.pop()
                if name not in found:
                    found.add(name)
                    waiting += self.graph[name]
            return found

        return [name for name in self.graph if name in reached(name)]

    def opsd_lines(self) -> int:
        return sum(m.lines for m in self.modules.values() if m.name.split(".")[0] == "opsd")

    def flat_modules(self) -> list[str]:
        return [m.name for m in self.modules.values() if m.room == "opsd"]

    def table(self) -> str:
        """The rooms from the top, and the figures that this file limits."""
        arrows = self.arrows
        lines = [f"{'room':<22}{'modules':>8}{'lines':>8}  imports from"]
        for room, modules in self.rooms.items():
            below = " ".join(b for b in ORDER if (room, b) in arrows)
            lines.append(f"{room:<22}{len(modules):>8}{sum(m.lines for m in modules):>8}  {below}")
        longest = max(self.modules.values(), key=lambda module: module.lines)
        functions = {name: n for m in self.modules.values() for name, n in m.functions.items()}
        function = max(functions, key=functions.__getitem__)
        return "\n".join(
            [
                *lines,
                "",
                f"rooms {len(self.rooms)}, arrows {len(arrows)}, upward {len(self.upward())}, "
                f"modules in cycles {len(self.in_cycles())}",
                f"Python in opsd/: {self.opsd_lines()} lines, "
                f"beside its rooms {len(self.flat_modules())} modules",
                f"longest module: {longest.name}, {longest.lines} lines",
                f"longest function: {function}, {functions[function]} lines",
            ]
        )


if __name__ == "__main__":
    print(House(ROOT).table())

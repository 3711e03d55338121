# Runs cells of code for the guest. Reads JSON requests, one a line, from
# standard input; after each cell it prints a mark with the request's nonce, so
# that the guest sees where the output ends. Standard library only.
import sys


def main():
    import ast, json, linecache, os, re, shlex, signal, traceback

    requests = os.fdopen(os.dup(0), "r", encoding="utf-8", newline="\n")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.set_inheritable(requests.fileno(), False)
    sys.argv = [""]
    sys.path.insert(0, "")
    space = {"__name__": "__main__", "__builtins__": __builtins__}
    count, last_cwd = 0, None

    def shell_lines(code):
        # Lines for the shell and the few magics that agents use.
        lines = []
        for line in code.split("\n"):
            found = re.match(r"^(\s*)(!|%pip\s|%cd\b|%)(.*)$", line)
            if found is None:
                lines.append(line)
                continue
            indent, kind, rest = found.groups()
            if kind == "%cd":
                target = rest.strip() or "~"
                lines.append(indent + "__import__('os').chdir(__import__('os').path.expanduser(%r))" % target)
                continue
            if kind == "!":
                command = rest
            elif kind.startswith("%pip"):
                command = shlex.quote(sys.executable) + " -m pip " + rest
            else:
                lines.append(line)
                continue
            lines.append(indent + "__import__('sys').stdout.flush(); None if __import__('os').system(%r) else None" % command)
        return "\n".join(lines)

    def run(code):
        nonlocal count
        count += 1
        name = "<cell %d>" % count
        try:
            try:
                tree = ast.parse(code, name)
            except SyntaxError:
                code = shell_lines(code)
                tree = ast.parse(code, name)
            linecache.cache[name] = (len(code), None, code.splitlines(True), name)
            shown = None
            if tree.body and isinstance(tree.body[-1], ast.Expr) and not code.rstrip().endswith(";"):
                shown = ast.Expression(tree.body.pop().value)
            exec(compile(tree, name, "exec"), space)
            if shown is not None:
                value = eval(compile(shown, name, "eval"), space)
                if value is not None:
                    space["_"] = value
                    print(repr(value))
        except SystemExit:
            pass
        except BaseException:
            kind, error, trace = sys.exc_info()
            while trace is not None and trace.tb_frame.f_code.co_filename != name:
                trace = trace.tb_next
            print("".join(traceback.format_exception(kind, error, trace)).rstrip())

    while True:
        # An interrupt is for a cell, not for the wait between cells.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        line = requests.readline()
        if not line:
            return
        request = json.loads(line)
        if request["cwd"] is not None and request["cwd"] != last_cwd:
            last_cwd = request["cwd"]
            try:
                os.chdir(last_cwd)
            except OSError:
                pass
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for code in request["cells"]:
                run(code)
        except KeyboardInterrupt:
            print("KeyboardInterrupt")
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except Exception:
                pass
        answer = {"cwd": os.getcwd(), "python": sys.executable}
        mark = "\n\0" + request["nonce"] + json.dumps(answer) + "\0"
        os.write(1, mark.encode("utf-8"))


main()

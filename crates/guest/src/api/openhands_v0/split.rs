//! Splits a text into the complete commands it holds: those that newlines
//! separate at the top level of bash's grammar. Enough of the grammar is known
//! to tell what belongs together: quotes, substitutions, here-documents,
//! compound commands, functions, lines that go on.

/// The commands of a text. One that is not complete, or beyond this grammar,
/// counts as a single command: the shell itself will say what is wrong.
pub(super) fn split(text: &str) -> Vec<&str> {
    let mut scanner = Scanner::new(text);
    match scanner.run() {
        Some(()) if !scanner.found.is_empty() => scanner.found,
        _ => vec![text.trim()],
    }
}

/// What has begun and needs its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Open {
    If,
    Loop,
    Brace,
    Paren,
    Test,
    /// Before its `in`; whether the word it looks at was read.
    CaseHead(bool),
    /// Whether a pattern is next.
    Case(bool),
}

struct HereDocument {
    delimiter: String,
    strips_tabs: bool,
}

struct Scanner<'t> {
    text: &'t str,
    bytes: &'t [u8],
    at: usize,
    begin: usize,
    open: Vec<Open>,
    here: Vec<HereDocument>,
    /// The next word is a command's first.
    first: bool,
    /// A command goes on after the line's end.
    goes_on: bool,
    /// Something other than blanks and comments was seen.
    seen: bool,
    /// A function's name was read, its body was not.
    wants_body: bool,
    found: Vec<&'t str>,
}

impl<'t> Scanner<'t> {
    fn new(text: &'t str) -> Self {
        Self {
            text,
            bytes: text.as_bytes(),
            at: 0,
            begin: 0,
            open: Vec::new(),
            here: Vec::new(),
            first: true,
            goes_on: false,
            seen: false,
            wants_body: false,
            found: Vec::new(),
        }
    }

    fn peek(&self, ahead: usize) -> u8 {
        self.bytes.get(self.at + ahead).copied().unwrap_or(0)
    }

    /// Reads everything; nothing when it is not complete.
    fn run(&mut self) -> Option<()> {
        while self.at < self.bytes.len() {
            match self.peek(0) {
                b'\n' => self.newline()?,
                b' ' | b'\t' | b'\r' => self.at += 1,
                b'#' => self.skip_comment(),
                b'\\' if self.peek(1) == b'\n' => self.at += 2,
                b';' | b'&' | b'|' | b'(' | b')' | b'<' | b'>' => {
                    self.seen = true;
                    self.operator()?;
                }
                _ => {
                    self.seen = true;
                    let from = self.at;
                    self.word()?;
                    let word = &self.text[from..self.at];
                    self.take_word(word)?;
                }
            }
        }
        if !self.open.is_empty() || self.goes_on || self.wants_body {
            return None;
        }
        self.end_command();
        Some(())
    }

    fn skip_comment(&mut self) {
        while self.at < self.bytes.len() && self.peek(0) != b'\n' {
            self.at += 1;
        }
    }

    /// A comment alone belongs to the command after it.
    fn end_command(&mut self) {
        if self.seen {
            self.found.push(self.text[self.begin..self.at].trim());
            self.begin = self.at;
            self.seen = false;
        }
    }

    fn newline(&mut self) -> Option<()> {
        self.at += 1;
        for document in std::mem::take(&mut self.here) {
            self.skip_document(&document)?;
        }
        self.first = true;
        if self.open.is_empty() && !self.goes_on && !self.wants_body {
            self.end_command();
        }
        Some(())
    }

    fn skip_document(&mut self, document: &HereDocument) -> Option<()> {
        loop {
            let rest = &self.text[self.at..];
            let (line, next) = match rest.find('\n') {
                Some(end) => (&rest[..end], self.at + end + 1),
                None => (rest, self.bytes.len()),
            };
            let line = if document.strips_tabs {
                line.trim_start_matches('\t')
            } else {
                line
            };
            if line == document.delimiter {
                self.at = next;
                return Some(());
            }
            if next >= self.bytes.len() {
                return None;
            }
            self.at = next;
        }
    }

    fn operator(&mut self) -> Option<()> {
        let (one, two) = (self.peek(0), self.peek(1));
        self.goes_on = false;
        match (one, two) {
            (b'<', b'<') if self.peek(2) != b'<' => return self.here_document(),
            (b'<' | b'>', b'(') => {
                self.at += 1;
                self.parenthesis()?;
                self.first = false;
            }
            (b'<' | b'>', _) | (b'&', b'>') => {
                while matches!(self.peek(0), b'<' | b'>' | b'&' | b'|') {
                    self.at += 1;
                }
                self.target()?;
            }
            (b'&', b'&') | (b'|', b'|') | (b'|', b'&') => {
                self.at += 2;
                self.goes_on = true;
                self.first = true;
            }
            (b'|', _) => {
                self.at += 1;
                self.goes_on = true;
                self.first = true;
            }
            (b';', b';') => {
                self.at += if self.peek(2) == b'&' { 3 } else { 2 };
                self.begin_pattern();
            }
            (b';', b'&') => {
                self.at += 2;
                self.begin_pattern();
            }
            (b';' | b'&', _) => {
                self.at += 1;
                self.first = true;
            }
            (b'(', b'(') if self.first => {
                self.parenthesis()?;
                self.first = false;
            }
            (b'(', _) => {
                self.at += 1;
                match self.open.last_mut() {
                    // The optional parenthesis before a pattern.
                    Some(Open::Case(true)) => {}
                    _ => {
                        if !self.first && self.next_is(b')') {
                            // name(): a function.
                            self.wants_body = true;
                        } else {
                            self.wants_body = false;
                            self.open.push(Open::Paren);
                        }
                        self.first = true;
                    }
                }
            }
            _ => {
                self.at += 1;
                match self.open.last_mut() {
                    Some(Open::Case(pattern)) if *pattern => {
                        *pattern = false;
                        self.first = true;
                    }
                    Some(Open::Paren) => {
                        self.open.pop();
                        self.first = false;
                    }
                    _ if self.wants_body => self.first = true,
                    _ => return None,
                }
            }
        }
        Some(())
    }

    fn begin_pattern(&mut self) {
        if let Some(Open::Case(pattern)) = self.open.last_mut() {
            *pattern = true;
        }
        self.first = true;
    }

    /// Whether the next character that is no blank is this one.
    fn next_is(&self, byte: u8) -> bool {
        self.bytes[self.at..]
            .iter()
            .find(|b| !matches!(b, b' ' | b'\t'))
            == Some(&byte)
    }

    fn skip_blanks(&mut self) {
        while matches!(self.peek(0), b' ' | b'\t') {
            self.at += 1;
        }
    }

    /// The word after a redirection.
    fn target(&mut self) -> Option<()> {
        self.skip_blanks();
        if !matches!(self.peek(0), 0 | b'\n' | b';' | b'&' | b'|' | b'(' | b')') {
            self.word()?;
        }
        Some(())
    }

    fn here_document(&mut self) -> Option<()> {
        self.at += 2;
        let strips_tabs = self.peek(0) == b'-';
        self.at += usize::from(strips_tabs);
        self.skip_blanks();
        let from = self.at;
        self.word()?;
        let delimiter = self.text[from..self.at]
            .chars()
            .filter(|c| !matches!(c, '\'' | '"' | '\\'))
            .collect();
        self.here.push(HereDocument {
            delimiter,
            strips_tabs,
        });
        Some(())
    }

    /// Reads to the end of a word.
    fn word(&mut self) -> Option<()> {
        while self.at < self.bytes.len() {
            match self.peek(0) {
                b' ' | b'\t' | b'\n' | b'\r' | b';' | b'&' | b'|' | b'(' | b')' | b'<' | b'>' => {
                    break;
                }
                _ => self.character()?,
            }
        }
        Some(())
    }

    /// One character of a word, with all that it begins.
    fn character(&mut self) -> Option<()> {
        match (self.peek(0), self.peek(1)) {
            (b'\\', _) => self.skip_escaped(),
            (b'\'', _) => self.skip_past(b'\'', false)?,
            (b'$', b'\'') => {
                self.at += 1;
                self.skip_past(b'\'', true)?;
            }
            (b'"', _) => self.double_quoted()?,
            (b'`', _) => self.skip_past(b'`', true)?,
            (b'$', b'(') => {
                self.at += 1;
                self.parenthesis()?;
            }
            (b'$', b'{') => {
                self.at += 1;
                self.braces()?;
            }
            _ => self.at += 1,
        }
        Some(())
    }

    fn skip_escaped(&mut self) {
        self.at += 1;
        let rest = &self.text[self.at.min(self.text.len())..];
        self.at += rest.chars().next().map_or(0, char::len_utf8);
    }

    /// From a quote past the next one of its kind.
    fn skip_past(&mut self, quote: u8, escapes: bool) -> Option<()> {
        self.at += 1;
        while self.at < self.bytes.len() {
            match self.peek(0) {
                b'\\' if escapes => self.skip_escaped(),
                byte => {
                    self.at += 1;
                    if byte == quote {
                        return Some(());
                    }
                }
            }
        }
        None
    }

    fn double_quoted(&mut self) -> Option<()> {
        self.at += 1;
        while self.at < self.bytes.len() {
            match (self.peek(0), self.peek(1)) {
                (b'"', _) => {
                    self.at += 1;
                    return Some(());
                }
                (b'\'', _) | (b'$', b'\'') => self.at += 1,
                _ => self.character()?,
            }
        }
        None
    }

    /// From a parenthesis past the one that closes it.
    fn parenthesis(&mut self) -> Option<()> {
        let mut depth = 0;
        while self.at < self.bytes.len() {
            match self.peek(0) {
                b'(' => {
                    depth += 1;
                    self.at += 1;
                }
                b')' => {
                    depth -= 1;
                    self.at += 1;
                    if depth == 0 {
                        return Some(());
                    }
                }
                b'#' if matches!(self.bytes[self.at - 1], b' ' | b'\t' | b'\n') => {
                    self.skip_comment();
                }
                _ => self.character()?,
            }
        }
        None
    }

    /// From a brace past the one that closes it.
    fn braces(&mut self) -> Option<()> {
        self.at += 1;
        while self.at < self.bytes.len() {
            if self.peek(0) == b'}' {
                self.at += 1;
                return Some(());
            }
            self.character()?;
        }
        None
    }

    fn take_word(&mut self, word: &str) -> Option<()> {
        self.goes_on = false;
        if let Some(Open::Test) = self.open.last() {
            if word == "]]" {
                self.open.pop();
            }
            return Some(());
        }
        if let Some(head @ Open::CaseHead(_)) = self.open.last_mut() {
            *head = match *head {
                Open::CaseHead(true) if word == "in" => Open::Case(true),
                _ => Open::CaseHead(true),
            };
            return Some(());
        }
        if let Some(Open::Case(true)) = self.open.last() {
            if word == "esac" {
                self.open.pop();
                self.first = false;
            }
            return Some(());
        }
        if !self.first {
            return Some(());
        }
        self.first = false;
        self.wants_body = false;
        match word {
            "if" => self.begin(Open::If),
            "while" | "until" => self.begin(Open::Loop),
            // What follows is a name, not a command.
            "for" | "select" => self.open.push(Open::Loop),
            "case" => self.open.push(Open::CaseHead(false)),
            "{" => self.begin(Open::Brace),
            "[[" => self.open.push(Open::Test),
            "then" | "else" | "elif" | "do" | "!" | "time" | "coproc" => self.first = true,
            "fi" => self.end(Open::If)?,
            "done" => self.end(Open::Loop)?,
            "}" => self.end(Open::Brace)?,
            "esac" => match self.open.pop() {
                Some(Open::Case(_)) => {}
                _ => return None,
            },
            "function" => {
                self.skip_blanks();
                self.word()?;
                self.wants_body = true;
                self.first = true;
                self.skip_blanks();
                if self.peek(0) == b'(' {
                    self.parenthesis()?;
                }
            }
            // An assignment may be followed by the command.
            _ => self.first = is_assignment(word),
        }
        Some(())
    }

    fn begin(&mut self, open: Open) {
        self.open.push(open);
        self.first = true;
    }

    fn end(&mut self, expected: Open) -> Option<()> {
        (self.open.pop()? == expected).then_some(())
    }
}

fn is_assignment(word: &str) -> bool {
    word.split_once('=').is_some_and(|(name, _)| {
        !name.is_empty()
            && !name.starts_with(|c: char| c.is_ascii_digit())
            && name
                .trim_end_matches('+')
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || c == '_')
    })
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn lines_are_commands() {
        assert_eq!(split("ls\npwd"), ["ls", "pwd"]);
        assert_eq!(split("  ls -l ; pwd && true  "), ["ls -l ; pwd && true"]);
        assert_eq!(
            split("a\n\n# about b\nb # c\n\nd &\ne"),
            ["a", "# about b\nb # c", "d &", "e"]
        );
        assert_eq!(split("# only a comment\nls"), ["# only a comment\nls"]);
        assert_eq!(split("A=1 B=2\nexport C"), ["A=1 B=2", "export C"]);
        assert_eq!(
            split("echo if then\necho done"),
            ["echo if then", "echo done"]
        );
    }

    #[test]
    fn what_belongs_together_is_one_command() {
        for one in [
            "echo 'a\nb'",
            "echo \"a\n$(ls\npwd)\n'\"",
            "echo a \\\n  b",
            "a &&\nb ||\nc |\nd",
            "for i in 1 2\ndo\n  echo $i\ndone",
            "while read x; do\n echo $x\ndone < file",
            "if true\nthen\n a\nelif b\nthen c\nelse\n d\nfi",
            "case $x in\n a) echo a\n ;;\n (b|c)\n echo in\n ;;\n *) done=1;;\nesac",
            "f() {\n echo f\n}",
            "f()\n{\n echo f\n}",
            "function f\n{\n echo\n}",
            "function f() {\n if x; then\n y\n fi\n}",
            "cat <<EOF\nline\nmore\nEOF",
            "cat <<-'EOF' > f && cat f\n\tif\n\tEOF",
            "cat <<A <<B\na\nA\nb\nB",
            "(cd /\n ls\n)",
            "{ a\nb\n}",
            "x=$(cat <<E\n)\nE\n)",
            "[[ a ==\nb ]]",
            "echo $((1+\n2)) ${x:-\n}",
            "((a\n+b))",
            "python3 -c '\nprint(1)\n'",
            "diff <(a\nb) <(c)",
            "echo `a\nb`",
        ] {
            assert_eq!(split(one), [one], "{one}");
        }
    }

    #[test]
    fn commands_after_something_long_are_seen() {
        assert_eq!(
            split("cat <<EOF > f\nls\nEOF\nls"),
            ["cat <<EOF > f\nls\nEOF", "ls"]
        );
        assert_eq!(split("f() { a; }\nf"), ["f() { a; }", "f"]);
        assert_eq!(
            split("for i in 1; do a; done\nb"),
            ["for i in 1; do a; done", "b"]
        );
        assert_eq!(
            split("case x in x) a;; esac\nb"),
            ["case x in x) a;; esac", "b"]
        );
        assert_eq!(split("echo 'x'\necho \"y\""), ["echo 'x'", "echo \"y\""]);
        assert_eq!(
            split("a 2>&1 | b\nc &> d\ne <<< f"),
            ["a 2>&1 | b", "c &> d", "e <<< f"]
        );
        assert_eq!(split("{ a; } > f\nb"), ["{ a; } > f", "b"]);
        assert_eq!(
            split("if a; then b; fi || c\nd"),
            ["if a; then b; fi || c", "d"]
        );
    }

    #[test]
    fn what_is_not_complete_is_left_to_the_shell() {
        for one in [
            "echo 'a\nb",
            "if a\nb",
            "a )\nb",
            "done\nx",
            "cat <<E\na\nb",
            "a &&",
            "echo $(\na",
            "\u{e9}\\",
        ] {
            assert_eq!(split(one), [one], "{one}");
        }
        assert_eq!(split("  \n "), [""]);
    }
}

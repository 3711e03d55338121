//! What the guest writes to a shell: one command, wrapped so that its end,
//! its exit code and its output can't be mistaken.
//!
//! Every command is an `eval` of one quoted word, read by the shell from its
//! control pipe and not from the terminal, so nothing of it is echoed and no
//! program can eat it. Before and after it the shell prints *marks* (see
//! [`super::mark`]) to the terminal, in line with the output. The marks are
//! spelled with octal escapes here: neither `set -v` nor a listing of the
//! shell's memory prints the real bytes. This module is text only; it starts
//! nothing and knows no descriptors.

use super::mark::{INTRODUCER, Nonce, TERMINATOR};
use std::fmt::Write as _;

/// What a shell program is able to do beyond POSIX.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flavor {
    /// GNU bash.
    Bash,
    /// dash, busybox ash or another POSIX shell.
    Posix,
}

/// Largest piece written to the control pipe at once. The pipe is in packet
/// mode, and a shell reads no more than its own buffer: the smallest known
/// one is that of busybox, 1023 bytes. A report fits into one packet, so that
/// a shell which throws its buffer away loses a whole report or nothing.
const PACKET: usize = 1000;

/// Lines for a shell, cut into packets of which none holds parts of two
/// lines.
pub(crate) type Packets = Vec<Vec<u8>>;

fn packets(line: &str, into: &mut Packets) {
    into.extend(line.as_bytes().chunks(PACKET).map(<[u8]>::to_vec));
}

/// What is carried over from the end of one command to the start of the next.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Carried {
    /// Exit code that `$?` shall have.
    pub(crate) status: i32,
    /// `set` letters to switch on again, of `e`, `x` and `v`.
    pub(crate) flags: String,
}

/// Writes commands for one shell.
#[derive(Debug)]
pub(crate) struct Control {
    flavor: Flavor,
    nonce: Nonce,
    probe_python: bool,
}

impl Control {
    /// For a shell of this flavor. With `probe_python` every report says
    /// which `python` the shell would run.
    pub(crate) fn new(flavor: Flavor, nonce: Nonce, probe_python: bool) -> Self {
        Self {
            flavor,
            nonce,
            probe_python,
        }
    }

    /// The first line for a new shell, before any command.
    pub(crate) fn opening(&self) -> Packets {
        let own = match self.flavor {
            // The wrapped commands would fill the history.
            Flavor::Bash => "\\command set +o history",
            // Descriptor 9 is how the shell got its script; children must
            // not inherit it.
            Flavor::Posix => "exec 9<&-",
        };
        let mut opening = Packets::new();
        packets(
            &format!(
                "{own}; \\command unset MAILCHECK MAIL; {}\n",
                self.prompts(0, 2)
            ),
            &mut opening,
        );
        opening
    }

    /// One command, and after it the report for the case that the command
    /// line itself was abandoned (an interrupt, in some shells a syntax
    /// error).
    pub(crate) fn command(&self, seq: u64, command: &str, carried: &Carried) -> Packets {
        let mut script = String::with_capacity(command.len() + 256);
        let start = self.print_mark(&format!("S;{seq}"), "");
        let _ = write!(script, "{{ {start};");
        if !carried.flags.is_empty() {
            let _ = write!(script, " \\command set -{};", carried.flags);
        }
        // With errexit on, the restored status would end the shell.
        if carried.status != 0 && !carried.flags.contains('e') {
            let _ = write!(script, " (\\command exit {});", carried.status);
        }
        script.push_str(" } 2>/dev/null\n");
        script.push_str(command);
        script.push('\n');

        let mut line = String::with_capacity(script.len() + 1024);
        line.push_str("\\eval ");
        quote(&script, &mut line);
        line.push_str(" </dev/tty; ");
        line.push_str(&self.report(seq, 1));
        line.push('\n');
        let mut lines = Packets::new();
        packets(&line, &mut lines);
        // bash can take the first word after an unterminated quote for an
        // argument; an empty line settles its parser.
        packets("\n", &mut lines);
        lines.extend(self.report_line(seq));
        lines
    }

    /// A report alone, for when an interrupt may have hit both of a
    /// command's own reports.
    pub(crate) fn report_line(&self, seq: u64) -> Packets {
        let mut lines = Packets::new();
        packets(&format!("{}\n", self.report(seq, 2)), &mut lines);
        lines
    }

    /// Tells how command `seq` ended. Tracing and errexit go off before the
    /// shell can trip over lines that are not the user's; they are restored
    /// with the next command.
    fn report(&self, seq: u64, phase: u8) -> String {
        let (prompt_command, python) = match self.flavor {
            Flavor::Bash => ("${PROMPT_COMMAND[*]:+p}", "\\command type -P python"),
            Flavor::Posix => ("", "\\command -v python"),
        };
        let mut report = String::from("{ ");
        report.push_str(&self.print_mark(
            &format!("E;{seq};%s;%s;%s;%s;%s"),
            &format!(" \"$?\" \"$-\" \"${{!-}}\" \"{prompt_command}\" \"${{PWD-}}\""),
        ));
        report.push_str("; \\command set +exv; ");
        if self.probe_python {
            // No substitution: the answer is printed between two marks
            // without a fork.
            let _ = write!(
                report,
                "{}; {python} >/dev/tty; ",
                self.print_mark(&format!("Y;{seq}"), "")
            );
        }
        report.push_str(&self.print_mark(&format!("R;{seq}"), ""));
        let _ = write!(report, "; {}; ", self.prompts(seq, phase));
        if self.flavor == Flavor::Bash {
            // A prompt command runs once for each command, as it would at a
            // terminal, though the shell reads several lines.
            report.push_str(match phase {
                1 => "__skyrl_hook=(\"${PROMPT_COMMAND[@]-}\") PROMPT_COMMAND=(); ",
                _ => {
                    "if [[ -v __skyrl_hook ]]; then PROMPT_COMMAND=(\"${__skyrl_hook[@]}\"); \
                     \\command unset __skyrl_hook; fi; "
                }
            });
        }
        report.push_str("} >/dev/null 2>&1 </dev/null");
        report
    }

    /// Makes the shell's prompts a mark and nothing.
    fn prompts(&self, seq: u64, phase: u8) -> String {
        let zero = match self.flavor {
            Flavor::Bash => " PS0=''",
            Flavor::Posix => "",
        };
        let nonce = self.nonce.as_str();
        format!("PS1='{INTRODUCER}{nonce};P;{seq};{phase}{TERMINATOR}' PS2=''{zero}")
    }

    /// A `printf` of a mark to the terminal, wherever the shell's own output
    /// goes by now. `format` may hold `%s`.
    fn print_mark(&self, format: &str, arguments: &str) -> String {
        format!(
            "\\command printf '\\033]7727;{};{format}\\007'{arguments} >/dev/tty",
            self.nonce.as_str()
        )
    }
}

/// Quotes text as one shell word.
pub(crate) fn quote(text: &str, into: &mut String) {
    into.push('\'');
    for (index, part) in text.split('\'').enumerate() {
        if index > 0 {
            into.push_str("'\\''");
        }
        into.push_str(part);
    }
    into.push('\'');
}

/// Text as one quoted shell word.
pub(crate) fn quoted(text: &str) -> String {
    let mut word = String::with_capacity(text.len() + 2);
    quote(text, &mut word);
    word
}

/// The `set` letters of `$-` that are switched off between commands.
pub(crate) fn carried_flags(dollar_minus: &str) -> String {
    dollar_minus
        .chars()
        .filter(|c| "exv".contains(*c))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_one_quoted_word_whatever_quotes_it_holds() {
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn the_text_of_a_command_holds_no_finished_mark() {
        let control = Control::new(Flavor::Bash, Nonce::new("0000000000000007"), true);
        let text = control.command(3, "echo hi", &Carried::default());
        let text = String::from_utf8(text.concat()).expect("text");
        // Only the prompt is spelled with real bytes, and it is never
        // printed while a command runs.
        assert!(!text.contains("\u{1b}]7727;0000000000000007;R"));
        assert!(text.contains("echo hi"));
    }

    #[test]
    fn a_report_fits_into_one_packet() {
        let control = Control::new(Flavor::Bash, Nonce::new("0000000000000007"), true);
        assert_eq!(control.report_line(u64::MAX).len(), 1);
    }

    #[test]
    fn only_flags_that_would_disturb_reports_are_carried() {
        assert_eq!(carried_flags("ehimxBHs"), "ex");
        let control = Control::new(Flavor::Posix, Nonce::new("0000000000000007"), false);
        let carried = Carried {
            status: 3,
            flags: "e".into(),
        };
        let text = String::from_utf8(control.command(1, "true", &carried).concat()).expect("text");
        assert!(text.contains("set -e") && !text.contains("exit 3"));
    }
}

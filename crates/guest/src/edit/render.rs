//! What the agent sees: numbered lines, snippets, directory listings. Pure;
//! the sentences that clients match on are those of the wire contract.

use std::fmt::Write as _;

/// Characters of a file or listing shown in one answer, so that one large
/// file does not fill a model's context.
pub(super) const SHOWN_CHARS: usize = 16_000;

/// Lines shown before and after an edit.
const SNIPPET_LINES: usize = 4;

const CLIPPED_FILE: &str = "<response clipped><NOTE>The rest is not shown because the output is limited. \
Find the line numbers you need with `grep -n`, then view that range.</NOTE>";
const CLIPPED_LISTING: &str = "<response clipped><NOTE>The rest is not shown because the output is limited. \
List the directories of interest one by one with `ls -la`.</NOTE>";

/// `cat -n` of a text, clipped; `first` is the number of its first line.
fn numbered(text: &str, first: usize) -> String {
    let clipped = clip(text);
    let shown = clipped.unwrap_or(text);
    let mut out = String::with_capacity(shown.len() + shown.len() / 4);
    for (at, line) in shown.split('\n').enumerate() {
        if at > 0 {
            out.push('\n');
        }
        // Writing to a String can't fail.
        let _ = write!(out, "{:6}\t{line}", first + at);
    }
    if clipped.is_some() {
        out.push_str(CLIPPED_FILE);
    }
    out
}

/// The part of a text that is shown, when it is too long.
fn clip(text: &str) -> Option<&str> {
    text.char_indices()
        .nth(SHOWN_CHARS)
        .map(|(end, _)| &text[..end])
}

/// A text under the sentence that announces it.
pub(super) fn view(path: &str, text: &str, first: usize) -> String {
    format!(
        "Here's the result of running `cat -n` on {path}:\n{}\n",
        numbered(text, first)
    )
}

/// A directory's listing; `entries` are full paths, directories with a final
/// slash; `hidden` counts the entries of the directory that are left out.
pub(super) fn listing(path: &str, entries: &[String], more: bool, hidden: usize) -> String {
    let all = entries.join("\n");
    let clipped = clip(&all);
    let mut out = format!(
        "Files and directories up to 2 levels deep in {path}, without hidden ones:\n{}",
        clipped.unwrap_or(&all)
    );
    if more || clipped.is_some() {
        out.push_str(CLIPPED_LISTING);
    }
    out.push('\n');
    if hidden > 0 {
        let _ = write!(
            out,
            "\n{hidden} hidden entries of this directory are not listed; `ls -la {path}` shows them."
        );
    }
    out
}

/// The lines around an edit: `at` is how many lines stand before the line (or
/// the inserted text) that changed, `new_lines` how many line ends it brought.
pub(super) fn snippet(text: &str, at: usize, new_lines: usize) -> String {
    let first = at.saturating_sub(SNIPPET_LINES);
    let last = at + SNIPPET_LINES + new_lines;
    let lines: Vec<&str> = text
        .split('\n')
        .skip(first)
        .take(last - first + 1)
        .collect();
    numbered(&lines.join("\n"), first + 1)
}

/// Answer to a replacement.
pub(super) fn replaced(path: &str, snippet: &str) -> String {
    format!(
        "The file {path} has been edited. Here's the result of running `cat -n` on a snippet of {path}:\n\
         {snippet}\n\
         Review the changes and make sure they are as expected. Edit the file again if necessary."
    )
}

/// Answer to an insertion.
pub(super) fn inserted(path: &str, snippet: &str) -> String {
    format!(
        "The file {path} has been edited. Here's the result of running `cat -n` on a snippet of the edited file:\n\
         {snippet}\n\
         Review the changes and make sure they are as expected (correct indentation, no duplicate lines, etc). \
         Edit the file again if necessary."
    )
}

/// Answer to an undo.
pub(super) fn undone(path: &str, text: &str) -> String {
    format!(
        "Last edit to {path} undone successfully. {}",
        view(path, text, 1)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_numbered_as_cat_n_does() {
        assert_eq!(
            view("/f", "a\nb\n", 1),
            "Here's the result of running `cat -n` on /f:\n     1\ta\n     2\tb\n     3\t\n"
        );
    }

    #[test]
    fn a_long_text_is_clipped_with_a_hint() {
        let shown = view("/f", &"é23456789\n".repeat(9_000), 1);
        assert!(shown.contains("  1600\té23456789\n  1601\t<response clipped>"));
        assert!(shown.contains("grep -n") && shown.ends_with("</NOTE>\n"));
    }

    #[test]
    fn a_snippet_shows_the_neighbourhood_and_stops_at_the_ends() {
        let text: String = (1..=20).map(|n| format!("l{n}\n")).collect();
        let middle = snippet(&text, 9, 1);
        assert!(middle.starts_with("     6\tl6\n") && middle.ends_with("\n    15\tl15"));
        assert!(snippet(&text, 0, 0).starts_with("     1\tl1\n"));
        assert!(snippet(&text, 19, 0).ends_with("    20\tl20\n    21\t"));
    }
}

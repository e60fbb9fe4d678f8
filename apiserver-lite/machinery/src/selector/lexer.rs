//! The tokens of a label selector.

/// One token. `In` and `NotIn` are words that count as identifiers where a value is expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token<'a> {
    /// `(`
    Open,
    /// `)`
    Close,
    /// `,`
    Comma,
    /// `!`
    Not,
    /// `=` or `==`
    Equals(&'a str),
    /// `!=`
    NotEquals,
    /// `>`
    Greater,
    /// `<`
    Less,
    /// A key, a value, or one of the words `in` and `notin`.
    Word(&'a str),
    /// Symbols that are no operator.
    Bad(&'a str),
    /// The end.
    End,
}

impl<'a> Token<'a> {
    /// What an error quotes.
    pub(super) fn text(self) -> &'a str {
        match self {
            Self::Open => "(",
            Self::Close => ")",
            Self::Comma => ",",
            Self::Not => "!",
            Self::NotEquals => "!=",
            Self::Greater => ">",
            Self::Less => "<",
            Self::Equals(text) | Self::Word(text) | Self::Bad(text) => text,
            Self::End => "",
        }
    }
}

const SYMBOLS: &[char] = &['=', '!', '(', ')', ',', '>', '<'];
const BLANKS: &[char] = &[' ', '\t', '\r', '\n'];

/// Reads a whole selector; the last token is [`Token::End`].
pub(super) fn tokens(text: &str) -> Vec<Token<'_>> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_start_matches(BLANKS);
    while !rest.is_empty() {
        let (token, length) = if rest.starts_with(SYMBOLS) { symbol(rest) } else { word(rest) };
        tokens.push(token);
        rest = rest.get(length..).unwrap_or_default().trim_start_matches(BLANKS);
    }
    tokens.push(Token::End);
    tokens
}

fn word(rest: &str) -> (Token<'_>, usize) {
    let end = rest.find(|c| SYMBOLS.contains(&c) || BLANKS.contains(&c)).unwrap_or(rest.len());
    (Token::Word(rest.get(..end).unwrap_or_default()), end)
}

fn symbol(rest: &str) -> (Token<'_>, usize) {
    for (text, token) in [("==", Token::Equals("==")), ("!=", Token::NotEquals)] {
        if rest.starts_with(text) {
            return (token, text.len());
        }
    }
    let token = match rest.chars().next() {
        Some('(') => Token::Open,
        Some(')') => Token::Close,
        Some(',') => Token::Comma,
        Some('!') => Token::Not,
        Some('=') => Token::Equals("="),
        Some('>') => Token::Greater,
        Some('<') => Token::Less,
        _ => Token::Bad(rest),
    };
    (token, 1)
}

//! How the page writes a number: short on axes and tiles, in full in tables. Pure.

/// Between a number and its unit, so that no line ends there.
const GAP: char = '\u{a0}';

/// Three significant digits and an SI prefix: `1.24M`.
pub(crate) fn short(value: f64) -> String {
    let (scale, prefix) = match value.abs() {
        size if size >= 999.5e6 => (1e9, "G"),
        size if size >= 999.5e3 => (1e6, "M"),
        size if size >= 999.5 => (1e3, "k"),
        _ => (1.0, ""),
    };
    significant(value / scale) + prefix
}

/// Three significant digits, all digits of a large number, in groups: `1,240,017`.
pub(crate) fn full(value: f64) -> String {
    if value.abs() < 999.5 { significant(value) } else { grouped(value) }
}

/// As [`full`], shortened where it would not fit a tile.
pub(crate) fn headline(value: f64) -> String {
    if value.abs() < 10_000.0 { full(value) } else { short(value) }
}

pub(crate) fn ms(value: f64) -> String {
    format!("{}{GAP}ms", full(value))
}

pub(crate) fn seconds(value: f64) -> String {
    format!("{}{GAP}s", full(value))
}

pub(crate) fn percent(value: f64) -> String {
    format!("{}{GAP}%", full(value))
}

/// `0.0412`, `4.12`, `412`, without trailing zeros; a dash for what is no number.
fn significant(value: f64) -> String {
    if !value.is_finite() {
        return "–".to_owned();
    }
    if value.abs() < 1e-9 {
        return "0".to_owned();
    }
    let decimals = (2.0 - value.abs().log10().floor()).clamp(0.0, 9.0) as usize;
    let text = format!("{value:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

fn grouped(value: f64) -> String {
    if !value.is_finite() {
        return "–".to_owned();
    }
    let digits = format!("{:.0}", value.abs());
    let mut text = if value < 0.0 { "-".to_owned() } else { String::new() };
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

//! Instants as the agent-server dialect writes and reads them. Pure; years
//! 1970 to 9999.

use std::time::{SystemTime, UNIX_EPOCH};

/// Microseconds since 1970, UTC.
pub(super) type Micros = u64;

const DAY: u64 = 86_400;

/// Now.
pub(super) fn now() -> Micros {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_micros() as u64)
}

/// Year, month, day of a day count since 1970.
fn civil(days: u64) -> (u64, u64, u64) {
    // Days since 0000-03-01, in eras of 400 years of 146097 days.
    let days = days + 719_468;
    let era = days / 146_097;
    let of_era = days % 146_097;
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    (era * 400 + year + u64::from(month <= 2), month, day)
}

/// Days since 1970 of a date; `None` before that or for no date.
fn days(year: u64, month: u64, day: u64) -> Option<u64> {
    if !(1970..=9999).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    let year = if month <= 2 { year - 1 } else { year };
    let shifted = if month > 2 { month - 3 } else { month + 9 };
    let of_year = (153 * shifted + 2) / 5 + day - 1;
    let of_era = (year % 400) * 365 + (year % 400) / 4 - (year % 400) / 100 + of_year;
    (year / 400 * 146_097 + of_era).checked_sub(719_468)
}

/// Hours, minutes, seconds of a day.
fn clock(seconds: u64) -> (u64, u64, u64) {
    (seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60)
}

/// `2026-11-22T17:47:24.871094Z`.
pub(super) fn iso(at: Micros) -> String {
    let seconds = at / 1_000_000;
    let (year, month, day) = civil(seconds / DAY);
    let (hour, minute, second) = clock(seconds);
    let micros = at % 1_000_000;
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
}

/// `20261122174724871094`, which sorts as time does.
pub(super) fn compact(at: Micros) -> String {
    iso(at).chars().filter(char::is_ascii_digit).collect()
}

/// `Sun, 22 Nov 2026 17:47:24 GMT`, from seconds since 1970.
pub(super) fn http_date(seconds: u64) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let (year, month, day) = civil(seconds / DAY);
    let (hour, minute, second) = clock(seconds);
    format!(
        "{}, {day:02} {} {year:04} {hour:02}:{minute:02}:{second:02} GMT",
        DAYS[(seconds / DAY % 7) as usize],
        MONTHS[(month - 1) as usize],
    )
}

/// Reads ISO 8601: a date, or date and time with optional seconds, fraction
/// and offset. Without an offset it is UTC.
pub(super) fn parse_iso(text: &str) -> Option<Micros> {
    let (date, rest) = text.split_at_checked(10)?;
    let mut parts = date.split('-');
    let mut number = |width: usize| {
        let part = parts.next()?;
        (part.len() == width).then(|| digits(part)).flatten()
    };
    let day = days(number(4)?, number(2)?, number(2)?)?;
    if parts.next().is_some() {
        return None;
    }
    let midnight = day * DAY * 1_000_000;
    if rest.is_empty() {
        return Some(midnight);
    }
    let rest = rest.strip_prefix(['T', 't', ' ', '_'])?;
    let zone = rest.find(['Z', 'z', '+', '-']).unwrap_or(rest.len());
    let (time, zone) = rest.split_at(zone);
    let offset = zone_offset(zone)?;
    let (time, fraction) = time.split_once(['.', ',']).unwrap_or((time, "0"));
    let mut parts = time.split(':');
    let hour = digits(parts.next()?).filter(|h| *h < 24)?;
    let minute = digits(parts.next()?).filter(|m| *m < 60)?;
    let second = parts.next().map_or(Some(0), digits).filter(|s| *s < 60)?;
    if parts.next().is_some() {
        return None;
    }
    let fraction: String = fraction.chars().chain("000000".chars()).take(6).collect();
    let local = midnight + ((hour * 60 + minute) * 60 + second) * 1_000_000 + digits(&fraction)?;
    local.checked_add_signed(-offset * 1_000_000)
}

fn digits(text: &str) -> Option<u64> {
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

/// Seconds east of UTC.
fn zone_offset(zone: &str) -> Option<i64> {
    let (sign, rest) = match zone.as_bytes().first() {
        None | Some(b'Z' | b'z') => return (zone.len() <= 1).then_some(0),
        Some(b'-') => (-1, &zone[1..]),
        _ => (1, &zone[1..]),
    };
    let compact: String = rest.chars().filter(|c| *c != ':').collect();
    let (hours, minutes) = match compact.len() {
        2 => (digits(&compact)?, 0),
        4 => (digits(&compact[..2])?, digits(&compact[2..])?),
        _ => return None,
    };
    (hours < 24 && minutes < 60).then_some(sign * ((hours * 60 + minutes) * 60) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instants_are_written_as_the_contract_shows_them() {
        let at = 1_795_369_644_871_094;
        assert_eq!(iso(at), "2026-11-22T17:47:24.871094Z");
        assert_eq!(compact(at), "20261122174724871094");
        assert_eq!(http_date(at / 1_000_000), "Sun, 22 Nov 2026 17:47:24 GMT");
        assert_eq!(iso(951_782_400_000_000), "2000-02-29T00:00:00.000000Z");
        assert_eq!(http_date(0), "Thu, 01 Jan 1970 00:00:00 GMT");
    }

    #[test]
    fn what_was_written_is_read_back() {
        for at in [
            0,
            951_782_400_000_000,
            1_795_369_644_871_094,
            4_107_542_399_999_999,
        ] {
            assert_eq!(parse_iso(&iso(at)), Some(at));
        }
        let at = parse_iso("2026-11-22T17:47:24.871094Z");
        for same in [
            "2026-11-22T17:47:24.871094",
            "2026-11-22 17:47:24.871094+00:00",
            "2026-11-22T19:17:24.871094+0130",
            "2026-11-22T12:47:24.871094-05",
        ] {
            assert_eq!(parse_iso(same), at, "{same}");
        }
        assert_eq!(parse_iso("2026-11-22"), parse_iso("2026-11-22T00:00"));
        for bad in [
            "",
            "x",
            "2026-13-01",
            "2026-11-22T",
            "2026-11-22T25:00",
            "2026-11-22T10:00+9",
            "é026-11-22é",
            "2026-1-222",
            "2026-11-22T10:00:00.x",
        ] {
            assert_eq!(parse_iso(bad), None, "{bad}");
        }
    }
}

//! Reading parameters and bodies of the agent-server dialect, with the error
//! bodies its clients know: status 422 and a list of what is wrong where.
//! Knows shapes, not meanings.

use super::time::{self, Micros};
use crate::http::{BodyError, Query, Request, Response};
use serde_json::{Map, Value, json};

/// What is wrong with a request; empty when nothing is.
#[derive(Debug, Default)]
pub(super) struct Problems(Vec<Value>);

impl Problems {
    /// The answer to a request with problems.
    pub(super) fn response(self) -> Response {
        Response::json(422, &json!({ "detail": self.0 }))
    }

    /// The value read, unless there were problems.
    pub(super) fn check<T>(self, value: T) -> Result<T, Response> {
        if self.0.is_empty() {
            Ok(value)
        } else {
            Err(self.response())
        }
    }

    /// Records a problem.
    fn add(&mut self, kind: &str, place: &[&str], message: &str, input: Value) {
        self.0
            .push(json!({"type": kind, "loc": place, "msg": message, "input": input}));
    }

    fn add_with(
        &mut self,
        kind: &str,
        place: &[&str],
        message: String,
        input: &str,
        context: Value,
    ) {
        self.0.push(
            json!({"type": kind, "loc": place, "msg": message, "input": input, "ctx": context}),
        );
    }

    /// A part of the request that must be there and is not.
    pub(super) fn missing(&mut self, place: &[&str], input: Value) {
        self.add("missing", place, "Field required", input);
    }

    /// A query parameter that must be there.
    pub(super) fn required<'q>(&mut self, query: &'q Query, name: &str) -> &'q str {
        query.get(name).unwrap_or_else(|| {
            self.missing(&["query", name], Value::Null);
            ""
        })
    }

    /// A whole number within bounds.
    pub(super) fn integer(
        &mut self,
        query: &Query,
        name: &str,
        least: i64,
        most: i64,
    ) -> Option<i64> {
        let given = query.get(name)?;
        let place = ["query", name];
        let Ok(number) = given.trim().parse::<i64>() else {
            self.add(
                "int_parsing",
                &place,
                "Input should be a valid integer, unable to parse string as an integer",
                given.into(),
            );
            return None;
        };
        if number < least {
            let message = format!("Input should be greater than or equal to {least}");
            self.add_with(
                "greater_than_equal",
                &place,
                message,
                given,
                json!({"ge": least}),
            );
        } else if number > most {
            let message = format!("Input should be less than or equal to {most}");
            self.add_with(
                "less_than_equal",
                &place,
                message,
                given,
                json!({"le": most}),
            );
        }
        Some(number)
    }

    /// One of several words.
    pub(super) fn word<'q>(
        &mut self,
        query: &'q Query,
        name: &str,
        kind: &str,
        allowed: &[&str],
    ) -> Option<&'q str> {
        let given = query.get(name)?;
        if !allowed.contains(&given) {
            let expected = match allowed {
                [first @ .., last] => {
                    let first: Vec<String> = first.iter().map(|w| format!("'{w}'")).collect();
                    format!("{} or '{last}'", first.join(", "))
                }
                [] => String::new(),
            };
            let message = format!("Input should be {expected}");
            self.add_with(
                kind,
                &["query", name],
                message,
                given,
                json!({"expected": expected}),
            );
        }
        Some(given)
    }

    /// A UUID of the query, as 32 digits without dashes.
    pub(super) fn query_uuid(&mut self, query: &Query, name: &str) -> Option<String> {
        let given = query.get(name)?;
        self.uuid(&["query", name], given)
    }

    /// A UUID, as 32 digits without dashes.
    pub(super) fn uuid(&mut self, place: &[&str], given: &str) -> Option<String> {
        let bare = given.strip_prefix("urn:uuid:").unwrap_or(given);
        let bare = bare.trim_start_matches('{').trim_end_matches('}');
        let digits = bare.replace('-', "").to_ascii_lowercase();
        let error = match digits.chars().position(|c| !c.is_ascii_hexdigit()) {
            Some(at) => {
                let found = digits.chars().nth(at).unwrap_or_default();
                format!("invalid character: found `{found}` at {at}")
            }
            None if digits.len() != 32 => format!("invalid length: found {}", digits.len()),
            None => return Some(digits),
        };
        let message = format!("Input should be a valid UUID, {error}");
        self.add_with(
            "uuid_parsing",
            place,
            message,
            given,
            json!({"error": error}),
        );
        None
    }

    /// A commit id or the beginning of one.
    pub(super) fn commit(&mut self, place: &[&str], given: &str) {
        let fits = (4..=64).contains(&given.len()) && given.bytes().all(|b| b.is_ascii_hexdigit());
        if !fits {
            let pattern = "^[0-9a-fA-F]{4,64}$";
            let message = format!("String should match pattern '{pattern}'");
            self.add_with(
                "string_pattern_mismatch",
                place,
                message,
                given,
                json!({"pattern": pattern}),
            );
        }
    }

    /// A point in time.
    pub(super) fn instant(&mut self, query: &Query, name: &str) -> Option<Micros> {
        let given = query.get(name)?;
        let parsed = time::parse_iso(given);
        if parsed.is_none() {
            let error = "it is not in ISO 8601 format";
            let message = format!("Input should be a valid datetime or date, {error}");
            let context = json!({"error": error});
            self.add_with(
                "datetime_from_date_parsing",
                &["query", name],
                message,
                given,
                context,
            );
        }
        parsed
    }

    /// A text member of a JSON body.
    pub(super) fn text(&mut self, body: &Map<String, Value>, name: &str) -> Option<String> {
        match body.get(name) {
            None => {
                self.missing(&["body", name], Value::Object(body.clone()));
                None
            }
            Some(Value::String(text)) => Some(text.clone()),
            Some(other) => {
                self.not_text(name, other);
                None
            }
        }
    }

    /// A text member that may be missing or null.
    pub(super) fn optional_text(
        &mut self,
        body: &Map<String, Value>,
        name: &str,
    ) -> Option<String> {
        match body.get(name) {
            None | Some(Value::Null) => None,
            Some(Value::String(text)) => Some(text.clone()),
            Some(other) => {
                self.not_text(name, other);
                None
            }
        }
    }

    fn not_text(&mut self, name: &str, found: &Value) {
        self.add(
            "string_type",
            &["body", name],
            "Input should be a valid string",
            found.clone(),
        );
    }

    /// A whole-number member that may be missing; strings and floats that are
    /// whole numbers count.
    pub(super) fn optional_integer(
        &mut self,
        body: &Map<String, Value>,
        name: &str,
    ) -> Option<i64> {
        let (kind, message) = match body.get(name)? {
            Value::Number(number) => {
                if let Some(whole) = whole(number.as_i64(), number.as_f64()) {
                    return Some(whole);
                }
                (
                    "int_from_float",
                    "Input should be a valid integer, got a number with a fractional part",
                )
            }
            Value::String(text) => {
                if let Some(whole) = whole(text.trim().parse().ok(), text.trim().parse().ok()) {
                    return Some(whole);
                }
                (
                    "int_parsing",
                    "Input should be a valid integer, unable to parse string as an integer",
                )
            }
            Value::Bool(flag) => return Some(i64::from(*flag)),
            _ => ("int_type", "Input should be a valid integer"),
        };
        let found = body.get(name).cloned().unwrap_or_default();
        self.add(kind, &["body", name], message, found);
        None
    }
}

fn whole(integer: Option<i64>, float: Option<f64>) -> Option<i64> {
    let bound = 9.0e15;
    integer.or_else(|| {
        float
            .filter(|f| f.fract() == 0.0 && f.abs() < bound)
            .map(|f| f as i64)
    })
}

/// A JSON object as the body of a request.
pub(super) fn object(request: &mut Request<'_>) -> Result<Map<String, Value>, Response> {
    let mut problems = Problems::default();
    match request.json::<Value>() {
        Ok(Value::Object(body)) => return Ok(body),
        Ok(Value::Null) => problems.missing(&["body"], Value::Null),
        Ok(other) => problems.add(
            "model_attributes_type",
            &["body"],
            "Input should be a valid dictionary or object to extract fields from",
            other,
        ),
        Err(BodyError::Json(error)) => {
            let context = json!({"error": error.to_string()});
            problems.add_with(
                "json_invalid",
                &["body"],
                "JSON decode error".to_owned(),
                "",
                context,
            );
        }
        Err(BodyError::TooLong(limit)) => {
            return Err(super::failure(
                413,
                &format!("The request body is longer than {limit} bytes"),
            ));
        }
        Err(BodyError::Io(error)) => {
            return Err(super::failure(
                400,
                &format!("The request body ended early: {error}"),
            ));
        }
    }
    Err(problems.response())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn details(problems: Problems) -> Vec<String> {
        problems
            .0
            .iter()
            .map(|p| p["msg"].as_str().unwrap_or("").to_owned())
            .collect()
    }

    #[test]
    fn numbers_are_taken_leniently_as_the_reference_takes_them() {
        let body = json!({"a": 3, "b": "4", "c": 2.0, "d": 1.5, "e": "x", "f": null, "g": true});
        let body = body.as_object().expect("object");
        let mut problems = Problems::default();
        for (name, expected) in [("a", 3), ("b", 4), ("c", 2), ("g", 1)] {
            assert_eq!(problems.optional_integer(body, name), Some(expected));
        }
        for name in ["d", "e", "f", "none"] {
            assert_eq!(problems.optional_integer(body, name), None);
        }
        assert_eq!(
            details(problems),
            [
                "Input should be a valid integer, got a number with a fractional part",
                "Input should be a valid integer, unable to parse string as an integer",
                "Input should be a valid integer",
            ]
        );
    }

    #[test]
    fn a_uuid_may_have_dashes() {
        let mut problems = Problems::default();
        let place = ["query", "id"];
        assert_eq!(
            problems
                .uuid(&place, "e8ef8156-169a-4d71-acb8-96D4A821D501")
                .as_deref(),
            Some("e8ef8156169a4d71acb896d4a821d501")
        );
        assert_eq!(problems.uuid(&place, "zz"), None);
        assert_eq!(problems.uuid(&place, ""), None);
        assert_eq!(
            details(problems),
            [
                "Input should be a valid UUID, invalid character: found `z` at 0",
                "Input should be a valid UUID, invalid length: found 0",
            ]
        );
    }

    #[test]
    fn all_problems_of_a_query_are_listed() {
        let query = Query::parse("limit=101&kind=Foo&at=x&order=y");
        let mut problems = Problems::default();
        problems.word(&query, "kind", "literal_error", &["A", "B"]);
        problems.integer(&query, "limit", 1, 100);
        problems.integer(&query, "order", i64::MIN, i64::MAX);
        problems.instant(&query, "at");
        problems.required(&query, "path");
        assert_eq!(details(problems).len(), 5);
    }
}

//! Where names are looked up: in the configured schema alone, or, without one, wherever the session's `search_path` leads.
//!
//! Statements name no schema. Each transaction sets it for itself, as a session behind a transaction pooler keeps nothing;
//! sessions of our own set it once.

use postgres::Client;

/// `database.schema`, which the configuration has checked: nothing in it ends a quotation.
#[derive(Debug, Clone, Default)]
pub(super) struct Home(Option<String>);

impl Home {
    pub(super) fn new(schema: Option<&str>) -> Home {
        Home(schema.map(|schema| format!("\"{schema}\"")))
    }

    /// The beginning of a SELECT's list: sets it for this transaction. Empty where there is nothing to set.
    pub(super) fn of_transaction(&self) -> String {
        let set = |schema: &String| format!("set_config('search_path', '{schema}', true), ");
        self.0.as_ref().map(set).unwrap_or_default()
    }

    /// The same as a statement of its own, which takes no snapshot.
    pub(super) fn statement_of_transaction(&self) -> String {
        self.0.as_ref().map(|schema| format!("SET LOCAL search_path = {schema}; ")).unwrap_or_default()
    }

    /// Sets it for a session of our own.
    pub(super) fn of_session(&self, client: &mut Client) -> Result<(), postgres::Error> {
        self.0.as_ref().map_or(Ok(()), |schema| client.batch_execute(&format!("SET search_path = {schema}")))
    }

    /// A name that means the same outside of these.
    pub(super) fn qualified(&self, name: &str) -> String {
        self.0.as_ref().map_or_else(|| name.to_owned(), |schema| format!("{schema}.{name}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_set_where_nothing_is_configured() {
        let shop = Home::new(Some("the Shop"));
        assert_eq!(shop.of_transaction(), "set_config('search_path', '\"the Shop\"', true), ");
        assert_eq!(shop.statement_of_transaction(), "SET LOCAL search_path = \"the Shop\"; ");
        assert_eq!(shop.qualified("outboxes"), "\"the Shop\".outboxes");
        let none = Home::new(None);
        assert_eq!((none.of_transaction(), none.statement_of_transaction()), (String::new(), String::new()));
        assert_eq!(none.qualified("outboxes"), "outboxes");
    }
}

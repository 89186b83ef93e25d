//! The values of `pg-outbox migrate --order`.

use clap::ValueEnum;
use clap::builder::PossibleValue;

use crate::command::migrate::OrderingScope;

impl ValueEnum for OrderingScope {
    fn value_variants<'a>() -> &'a [OrderingScope] {
        &[OrderingScope::Key, OrderingScope::Topic, OrderingScope::All]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let help = match self {
            OrderingScope::Key => "The metadata field `ordering-key`, else the topic",
            OrderingScope::Topic => "The topic alone",
            OrderingScope::All => "Everything: one order over all events",
        };
        Some(PossibleValue::new(self.name()).help(help))
    }
}

//! How a section is declared: `section!` makes the struct, its reading and its comparison of one list of keys.
//!
//! ```text
//! section! {
//!     /// How events are claimed and tried.
//!     pub struct Dispatcher = "dispatcher" {
//!         /// Events of one claim at most.
//!         pub batch_size: usize = key(100, count(1..=100_000)).live(),
//!     }
//! }
//! ```
//!
//! becomes `pub struct Dispatcher { pub batch_size: usize }`, and beside it `defaults`, `read_keys`, which asks the file for
//! `batch_size`, and `take_keys`, which a reload compares with. So a key is declared once, and none can be read and not
//! compared. Fields that are made of several keys, or of a section below, stand in a second list, `with { ... }`: whoever
//! calls `defaults` or `read_keys` hands them in, and compares them.

macro_rules! section {
    (
        $(#[$about:meta])*
        pub struct $Section:ident = $path:literal {
            $($(#[$meaning:meta])* pub $field:ident: $T:ty = $key:expr,)*
        }
        $(with { $($(#[$other_meaning:meta])* pub $other:ident: $U:ty,)* })?
    ) => {
        $(#[$about])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $Section {
            $(
                $(#[$meaning])*
                #[doc = concat!("\n\n`", $path, ".", stringify!($field), "`: `", stringify!($key), "`")]
                pub $field: $T,
            )*
            $($($(#[$other_meaning])* pub $other: $U,)*)?
        }

        impl $Section {
            /// What stands when none of its keys is written.
            pub fn defaults($($($other: $U,)*)?) -> $Section {
                $Section {
                    $($field: { let key: $crate::config::key::Key<$T> = $key; key.default },)*
                    $($($other,)*)?
                }
            }

            /// Reads each key of the list, in its order.
            pub(super) fn read_keys(
                section: &$crate::config::reading::Section<'_>,
                reading: &mut $crate::config::reading::ConfigReading<'_>,
                $($($other: $U,)*)?
            ) -> $Section {
                $Section { $($field: reading.value(section, stringify!($field), $key),)* $($($other,)*)? }
            }

            /// Takes over what a reload applies, and notes what differs.
            pub(super) fn take_keys(&mut self, new: &$Section, changes: &mut $crate::config::changes::Changes) {
                $(
                    let key: $crate::config::key::Key<$T> = $key;
                    let name = concat!($path, ".", stringify!($field));
                    changes.compare(name, key.reload, &mut self.$field, &new.$field);
                )*
            }
        }
    };
}

pub(super) use section;

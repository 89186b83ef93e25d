//! Topic to subject.
/// The map.
#[derive(Debug, Clone, Default)]
pub struct TopicMap;

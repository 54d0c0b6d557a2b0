//! The host's rules for tenants, as they are written.

use serde::Deserialize;

/// What the tenants of a pattern may use.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Rule {
    /// The tenants: a name as in the agent's log, in which `*` stands for any characters.
    pub tenant: String,
    /// The engine that their sessions get, and no other.
    pub engine: Option<String>,
    /// The device that their sessions get, and no other.
    pub device: Option<String>,
    /// The operations they may run; all when not said.
    pub operations: Option<Vec<String>>,
    /// Names of the host's models that they may use, in which `*` stands for any characters; all when not said.
    pub models: Option<Vec<String>>,
    /// Whether they may run libraries that they bring, in processes that can do nothing else.
    #[serde(default)]
    pub exec: bool,
    /// Whether the metrics that they read are those of all tenants.
    #[serde(default)]
    pub operator: bool,
    /// Each tenant's share of the lanes, as a multiple of that of tenants without a rule.
    pub weight: Option<u32>,
}

//! What the host lets each tenant use: operations and engine, by rules of the configuration file.
//!
//! ```toml
//! [[policy]]
//! tenant = "vsock:*"               # as in the agent's log; * stands for any characters, at the end or anywhere
//! engine = "tract"                 # its sessions get this engine and no other
//! operations = ["noop", "sgemm"]   # all others are off
//! models = ["resnet*"]             # what it sees of the host's models
//! exec = true                      # it may run libraries that it brings
//! operator = true                  # its metrics are those of all tenants
//! weight = 4                       # four times the lane time of another tenant, while both want it
//! ```
//!
//! The first rule whose pattern fits a tenant counts; a tenant that none fits may use everything.

use vaccel_proto::error::shown;
use vaccel_proto::{Error, Reason};

use crate::backend::Choice;
use crate::config::{ConfigError, Rule};
use crate::identity::Tenant;

/// The greatest share of the lanes: the least one beside it is still served.
const WEIGHT_MAX: u32 = 1000;

/// All rules, the first one that fits counts.
#[derive(Debug, Default)]
pub(crate) struct Policies(Vec<Rule>);

impl Policies {
    /// Rules whose operations are among those known.
    ///
    /// # Errors
    /// The name that is not.
    pub(crate) fn new(rules: Vec<Rule>, known: &[String]) -> Result<Self, ConfigError> {
        for (index, rule) in rules.iter().enumerate() {
            if rule.tenant.is_empty() {
                let message = format!("policy[{index}].tenant: expected a tenant such as vsock:3, or *");
                return Err(ConfigError::new(message));
            }
            if rule.weight.is_some_and(|weight| !(1..=WEIGHT_MAX).contains(&weight)) {
                let message = format!("policy[{index}].weight: expected 1 to {WEIGHT_MAX}");
                return Err(ConfigError::new(message));
            }
            let unknown = rule.operations.iter().flatten().find(|name| !known.contains(name));
            if let Some(name) = unknown {
                let known = known.join(", ");
                let message = format!("policy[{index}].operations: expected names of {known}; got {name:?}");
                return Err(ConfigError::new(message));
            }
        }
        Ok(Self(rules))
    }

    /// The rule for a tenant.
    pub(crate) fn of(&self, tenant: &Tenant) -> Option<&Rule> {
        self.0.iter().find(|rule| fits(&rule.tenant, tenant.as_str()))
    }

    /// Whether the tenant may run an operation.
    pub(crate) fn allows(&self, tenant: &Tenant, operation: &str) -> bool {
        let allowed = self.of(tenant).and_then(|rule| rule.operations.as_ref());
        allowed.is_none_or(|names| names.iter().any(|name| name == operation))
    }

    /// The tenant's share of the lanes, as a multiple of that of a tenant without a rule.
    pub(crate) fn weight(&self, tenant: &Tenant) -> u32 {
        self.of(tenant).and_then(|rule| rule.weight).unwrap_or(1)
    }

    /// Whether the tenant may use a model of the host's.
    pub(crate) fn allows_model(&self, tenant: &Tenant, name: &str) -> bool {
        let allowed = self.of(tenant).and_then(|rule| rule.models.as_ref());
        allowed.is_none_or(|patterns| patterns.iter().any(|pattern| fits(pattern, name)))
    }

    /// Whether the tenant may run libraries that it brings.
    pub(crate) fn allows_libraries(&self, tenant: &Tenant) -> bool {
        self.of(tenant).is_some_and(|rule| rule.exec)
    }

    /// Whether the tenant may see what all tenants' runs took.
    pub(crate) fn is_operator(&self, tenant: &Tenant) -> bool {
        self.of(tenant).is_some_and(|rule| rule.operator)
    }

    /// What the tenant's session gets of what it asked for.
    ///
    /// # Errors
    /// `DISABLED` when it asked for another engine or device than it may have.
    pub(crate) fn wish(&self, tenant: &Tenant, asked: Choice) -> Result<Choice, Error> {
        let Some(rule) = self.of(tenant) else { return Ok(asked) };
        let settle = |what: &str, asked: String, given: &Option<String>| match given {
            Some(given) if !asked.is_empty() && asked != *given => {
                let asked = shown(&asked);
                let message = format!(
                    "{what} {asked} was asked for; by the host's policy the sessions of this tenant get {given}"
                );
                Err(Error::new(Reason::Disabled, message))
            }
            given => Ok(given.clone().unwrap_or(asked)),
        };
        Ok(Choice {
            engine: settle("engine", asked.engine, &rule.engine)?,
            device: settle("device", asked.device, &rule.device)?,
        })
    }

    /// # Errors
    /// `DISABLED`, with what the tenant may run, for an operation that is off for it.
    pub(crate) fn check(&self, tenant: &Tenant, operation: &str) -> Result<(), Error> {
        if self.allows(tenant, operation) {
            return Ok(());
        }
        let allowed = self.of(tenant).and_then(|rule| rule.operations.as_deref()).unwrap_or_default();
        let allowed = if allowed.is_empty() { "none".into() } else { allowed.join(", ") };
        let message =
            format!("{operation} is off for this tenant by the host's policy; what it may run: {allowed}");
        Err(Error::new(Reason::Disabled, message))
    }
}

/// Whether a text is the pattern's, in which `*` stands for any characters.
fn fits(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| text.strip_prefix(first)) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stand_for_any_characters() {
        for (pattern, text, expected) in [
            ("vsock:3", "vsock:3", true),
            ("vsock:3", "vsock:33", false),
            ("vsock:*", "vsock:33", true),
            ("*", "", true),
            ("unix:*:1000", "unix:/run/vaccel.sock:1000", true),
            ("unix:*:1000", "unix:/run/vaccel.sock:10", false),
            ("a*b*c", "a-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("ab*ba", "aba", false),
        ] {
            assert_eq!(fits(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn the_first_rule_that_fits_counts() {
        let rule = |tenant: &str, operations: Option<&[&str]>| Rule {
            tenant: tenant.into(),
            operations: operations.map(|names| names.iter().map(|name| (*name).to_owned()).collect()),
            ..Rule::default()
        };
        let known = ["noop".to_owned(), "sgemm".to_owned()];
        let rules = vec![rule("vsock:3", Some(&["noop"])), rule("vsock:*", Some(&[])), rule("tcp:*", None)];
        let policies = Policies::new(rules, &known).expect("valid");
        for (tenant, noop, sgemm) in [
            ("vsock:3", true, false),
            ("vsock:4", false, false),
            ("tcp:a", true, true),
            ("unix:a:0", true, true),
        ] {
            let tenant = Tenant::new(tenant);
            let may = ["noop", "sgemm"].map(|name| policies.check(&tenant, name).is_ok());
            assert_eq!(may, [noop, sgemm], "{tenant}");
        }
        for (wrong, named) in [(rule("", None), "tenant"), (rule("*", Some(&["nop"])), "nop")] {
            let refusal = Policies::new(vec![wrong], &known).expect_err(named).to_string();
            assert!(refusal.contains(named), "{refusal}");
        }
    }
}

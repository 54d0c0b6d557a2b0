//! Numbers in JSON are those that were written, to the last place.

use serde_json::{Value, json};

use super::limits::http;
use super::start;

const MODEL: &str = r#"
backend: "identity"
input [ { name: "x" data_type: TYPE dims: [ -1 ] } ]
output [ { name: "x" data_type: TYPE dims: [ -1 ] } ]
"#;

#[test]
fn numbers_in_json_come_back_as_they_went() {
    let types = ["FP64", "INT64", "UINT64", "FP32"];
    let fill = |models: &super::Models| {
        for name in types {
            models.config(name, &MODEL.replace("TYPE", &format!("TYPE_{name}")));
        }
    };
    let agent = start(fill, &[]);
    let run = |datatype: &str, data: &str| {
        let count = data.split(',').count();
        let body = format!(
            r#"{{"inputs":[{{"name":"x","datatype":"{datatype}","shape":[{count}],"data":[{data}]}}]}}"#
        );
        http(&agent, "POST", &format!("/v2/models/{datatype}/infer"), body.as_bytes())
    };
    for (datatype, data) in [
        ("FP64", "[51.24817837550540,31.245270191439438,5e-324,1.7976931348623157e308]"),
        ("INT64", "[-9223372036854775808,9223372036854775807,9007199254740993]"),
        ("UINT64", "[0,18446744073709551615,9007199254740993]"),
        ("FP32", "[16777216.0,0.1,3.4028235e+38]"),
    ] {
        let (status, body) = run(datatype, data.trim_matches(['[', ']']));
        assert_eq!(status, 200, "{body}");
        let answer: Value = serde_json::from_str(&body).unwrap();
        let numbers: Vec<f64> = serde_json::from_str(data).unwrap();
        match datatype {
            "FP64" => assert_eq!(answer["outputs"][0]["data"], json!(numbers)),
            _ => assert!(body.contains(data), "{body}"),
        }
    }

    let (status, body) = run("FP32", "1,NaN");
    assert_eq!(status, 400);
    assert!(body.contains("JSON has no NaN and no Infinity"), "{body}");
    let (status, body) = run("FP32", r#""NaN","-Infinity""#);
    assert_eq!(status, 400, "they are numbers, for which the answer has no words in JSON: {body}");
    assert!(body.contains("values that JSON has no words for"), "{body}");
    let (status, body) = run("FP32", r#""one""#);
    assert_eq!(status, 400);
    assert!(body.contains("expected elements of type"), "{body}");
    let (status, body) = run("INT64", "9223372036854775808");
    assert_eq!(status, 400, "{body}");
}

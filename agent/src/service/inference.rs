//! The door of package `inference`: the Open Inference Protocol over gRPC.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;

use tonic::codegen::tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};
use tracing::level_filters::LevelFilter;
use vaccel_proto::inference::grpc_inference_service_server::GrpcInferenceService;
use vaccel_proto::inference::{
    CudaSharedMemoryRegisterRequest, CudaSharedMemoryRegisterResponse, CudaSharedMemoryStatusRequest,
    CudaSharedMemoryStatusResponse, CudaSharedMemoryUnregisterRequest, CudaSharedMemoryUnregisterResponse,
    LogSettingsRequest, LogSettingsResponse, ModelConfigRequest, ModelConfigResponse, ModelInferRequest,
    ModelInferResponse, ModelMetadataRequest, ModelMetadataResponse, ModelReadyRequest, ModelReadyResponse,
    ModelStatisticsRequest, ModelStatisticsResponse, ModelStreamInferResponse, RepositoryIndexRequest,
    RepositoryIndexResponse, RepositoryModelLoadRequest, RepositoryModelLoadResponse,
    RepositoryModelUnloadRequest, RepositoryModelUnloadResponse, ServerLiveRequest, ServerLiveResponse,
    ServerMetadataRequest, ServerMetadataResponse, ServerReadyRequest, ServerReadyResponse,
    SystemSharedMemoryRegisterRequest, SystemSharedMemoryRegisterResponse, SystemSharedMemoryStatusRequest,
    SystemSharedMemoryStatusResponse, SystemSharedMemoryUnregisterRequest,
    SystemSharedMemoryUnregisterResponse, TraceSettingRequest, TraceSettingResponse,
};
use vaccel_proto::{Error, Reason};

use super::caller;
use crate::dispatch::Dispatch;

/// What the agent has beyond the protocol itself, by the names of its extensions.
pub(super) const EXTENSIONS: [&str; 10] = [
    "classification",
    "sequence",
    "model_repository",
    "schedule_policy",
    "model_configuration",
    "system_shared_memory",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "logging",
];

/// The service.
#[derive(Debug)]
pub(super) struct Door {
    dispatch: Arc<Dispatch>,
}

impl Door {
    pub(super) fn new(dispatch: Arc<Dispatch>) -> Arc<Self> {
        Arc::new(Self { dispatch })
    }
}

/// What this agent is.
pub(super) fn server_metadata() -> ServerMetadataResponse {
    ServerMetadataResponse {
        name: "vaccel-agent".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        extensions: EXTENSIONS.map(str::to_owned).to_vec(),
    }
}

/// No device here has memory to share.
pub(super) fn no_cuda() -> Error {
    let message = "failed to register shared memory region: invalid args: no device here has memory to share";
    Error::new(Reason::BadArgument, message)
}

/// No such region is registered.
pub(super) fn no_cuda_region(name: &str) -> Error {
    let name = vaccel_proto::error::shown(name);
    Error::new(
        Reason::NotFound,
        format!("Unable to find cuda shared memory region: '{}'", name.trim_matches('"')),
    )
}

/// There is one repository.
fn check_repository(name: &str) -> Result<(), Error> {
    if name.is_empty() {
        return Ok(());
    }
    Err(Error::new(Reason::UnknownOperation, "'repository_name' specification is not supported"))
}

/// Settings of this agent that others cannot change.
pub(super) fn read_only(what: &str) -> Error {
    Error::new(Reason::Disabled, format!("{what} are the host's; they are set where the agent is started"))
}

#[tonic::async_trait]
impl GrpcInferenceService for Door {
    async fn server_live(
        &self,
        _: Request<ServerLiveRequest>,
    ) -> Result<Response<ServerLiveResponse>, Status> {
        Ok(Response::new(ServerLiveResponse { live: true }))
    }

    async fn server_ready(
        &self,
        _: Request<ServerReadyRequest>,
    ) -> Result<Response<ServerReadyResponse>, Status> {
        Ok(Response::new(ServerReadyResponse { ready: self.dispatch.is_ready() }))
    }

    async fn model_ready(
        &self,
        request: Request<ModelReadyRequest>,
    ) -> Result<Response<ModelReadyResponse>, Status> {
        let ModelReadyRequest { name, version } = request.get_ref();
        let ready = self.dispatch.model_ready(&caller(&request)?, name, version).await?;
        Ok(Response::new(ModelReadyResponse { ready }))
    }

    async fn server_metadata(
        &self,
        _: Request<ServerMetadataRequest>,
    ) -> Result<Response<ServerMetadataResponse>, Status> {
        Ok(Response::new(server_metadata()))
    }

    async fn model_metadata(
        &self,
        request: Request<ModelMetadataRequest>,
    ) -> Result<Response<ModelMetadataResponse>, Status> {
        let ModelMetadataRequest { name, version } = request.get_ref();
        Ok(Response::new(self.dispatch.model_metadata(&caller(&request)?, name, version).await?))
    }

    async fn model_infer(
        &self,
        request: Request<ModelInferRequest>,
    ) -> Result<Response<ModelInferResponse>, Status> {
        let caller = caller(&request)?;
        Ok(Response::new(self.dispatch.infer(&caller, request.into_inner()).await?))
    }

    type ModelStreamInferStream =
        Pin<Box<dyn Stream<Item = Result<ModelStreamInferResponse, Status>> + Send>>;

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<ModelInferRequest>>,
    ) -> Result<Response<Self::ModelStreamInferStream>, Status> {
        let caller = caller(&request)?;
        let runs = super::stream::runs(Arc::clone(&self.dispatch), caller, request.into_inner());
        Ok(Response::new(Box::pin(runs)))
    }

    async fn model_config(
        &self,
        request: Request<ModelConfigRequest>,
    ) -> Result<Response<ModelConfigResponse>, Status> {
        let ModelConfigRequest { name, version } = request.get_ref();
        let config = self.dispatch.model_config(&caller(&request)?, name, version).await?;
        Ok(Response::new(ModelConfigResponse { config: Some(config) }))
    }

    async fn model_statistics(
        &self,
        request: Request<ModelStatisticsRequest>,
    ) -> Result<Response<ModelStatisticsResponse>, Status> {
        let ModelStatisticsRequest { name, version } = request.get_ref();
        let model_stats = self.dispatch.model_statistics(&caller(&request)?, name, version).await?;
        Ok(Response::new(ModelStatisticsResponse { model_stats }))
    }

    async fn repository_index(
        &self,
        request: Request<RepositoryIndexRequest>,
    ) -> Result<Response<RepositoryIndexResponse>, Status> {
        let RepositoryIndexRequest { repository_name, ready } = request.get_ref();
        check_repository(repository_name)?;
        let mut models = self.dispatch.repository_index(&caller(&request)?).await?;
        models.retain(|model| !ready || model.state == "READY");
        Ok(Response::new(RepositoryIndexResponse { models }))
    }

    async fn repository_model_load(
        &self,
        request: Request<RepositoryModelLoadRequest>,
    ) -> Result<Response<RepositoryModelLoadResponse>, Status> {
        let caller = caller(&request)?;
        let RepositoryModelLoadRequest { repository_name, model_name, parameters } = request.into_inner();
        check_repository(&repository_name)?;
        self.dispatch.repository_load(&caller, &model_name, parameters).await?;
        Ok(Response::new(RepositoryModelLoadResponse {}))
    }

    async fn repository_model_unload(
        &self,
        request: Request<RepositoryModelUnloadRequest>,
    ) -> Result<Response<RepositoryModelUnloadResponse>, Status> {
        let RepositoryModelUnloadRequest { repository_name, model_name, .. } = request.get_ref();
        check_repository(repository_name)?;
        self.dispatch.repository_unload(&caller(&request)?, model_name).await?;
        Ok(Response::new(RepositoryModelUnloadResponse {}))
    }

    async fn system_shared_memory_status(
        &self,
        request: Request<SystemSharedMemoryStatusRequest>,
    ) -> Result<Response<SystemSharedMemoryStatusResponse>, Status> {
        let regions = self.dispatch.regions(&caller(&request)?, &request.get_ref().name).await?;
        Ok(Response::new(SystemSharedMemoryStatusResponse { regions }))
    }

    async fn system_shared_memory_register(
        &self,
        request: Request<SystemSharedMemoryRegisterRequest>,
    ) -> Result<Response<SystemSharedMemoryRegisterResponse>, Status> {
        let caller = caller(&request)?;
        self.dispatch.register_region(&caller, request.into_inner()).await?;
        Ok(Response::new(SystemSharedMemoryRegisterResponse {}))
    }

    async fn system_shared_memory_unregister(
        &self,
        request: Request<SystemSharedMemoryUnregisterRequest>,
    ) -> Result<Response<SystemSharedMemoryUnregisterResponse>, Status> {
        self.dispatch.unregister_region(&caller(&request)?, &request.get_ref().name).await?;
        Ok(Response::new(SystemSharedMemoryUnregisterResponse {}))
    }

    async fn cuda_shared_memory_status(
        &self,
        request: Request<CudaSharedMemoryStatusRequest>,
    ) -> Result<Response<CudaSharedMemoryStatusResponse>, Status> {
        let name = &request.get_ref().name;
        if !name.is_empty() {
            return Err(no_cuda_region(name).into());
        }
        Ok(Response::new(CudaSharedMemoryStatusResponse { regions: HashMap::new() }))
    }

    async fn cuda_shared_memory_register(
        &self,
        _: Request<CudaSharedMemoryRegisterRequest>,
    ) -> Result<Response<CudaSharedMemoryRegisterResponse>, Status> {
        Err(no_cuda().into())
    }

    async fn cuda_shared_memory_unregister(
        &self,
        _: Request<CudaSharedMemoryUnregisterRequest>,
    ) -> Result<Response<CudaSharedMemoryUnregisterResponse>, Status> {
        Ok(Response::new(CudaSharedMemoryUnregisterResponse {}))
    }

    async fn trace_setting(
        &self,
        request: Request<TraceSettingRequest>,
    ) -> Result<Response<TraceSettingResponse>, Status> {
        if !request.get_ref().settings.is_empty() {
            return Err(read_only("trace settings").into());
        }
        Ok(Response::new(trace_settings()))
    }

    async fn log_settings(
        &self,
        request: Request<LogSettingsRequest>,
    ) -> Result<Response<LogSettingsResponse>, Status> {
        if !request.get_ref().settings.is_empty() {
            return Err(read_only("log settings").into());
        }
        Ok(Response::new(log_settings()))
    }
}

/// Nothing is traced.
pub(super) fn trace_settings() -> TraceSettingResponse {
    use vaccel_proto::inference::trace_setting_response::SettingValue;
    let off = SettingValue { value: vec!["OFF".into()] };
    TraceSettingResponse { settings: HashMap::from([("trace_level".to_owned(), off)]) }
}

/// What is logged, by the names that this protocol has for it.
pub(super) fn log_settings() -> LogSettingsResponse {
    use vaccel_proto::inference::log_settings_response::SettingValue;
    use vaccel_proto::inference::log_settings_response::setting_value::ParameterChoice;
    let level = |level| ParameterChoice::BoolParam(LevelFilter::current() >= level);
    let settings = [
        ("log_error", level(LevelFilter::ERROR)),
        ("log_warning", level(LevelFilter::WARN)),
        ("log_info", level(LevelFilter::INFO)),
        ("log_format", ParameterChoice::StringParam("default".into())),
    ];
    let setting =
        |(name, choice): (&str, _)| (name.to_owned(), SettingValue { parameter_choice: Some(choice) });
    LogSettingsResponse { settings: settings.map(setting).into() }
}
